#!/usr/bin/env bash
# Builds libbkpack and installs it: header, shared and static library, pkg-config file.
#
#     capi/install.sh PREFIX [PROFILE]
#
# PREFIX is a folder such as /usr/local; PROFILE is release, or dev for a faster build of a slower library.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prefix="$1"
profile="${2:-release}"
root="$(cd "$(dirname "$0")/.." && pwd)"
cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --workspace --lib --profile "$profile"
built="${CARGO_TARGET_DIR:-$root/target}/${profile/#dev/debug}"
version="$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)"

install -d "$prefix/include" "$prefix/lib/pkgconfig"
install -m 644 "$root/capi/include/bkpack.h" "$prefix/include/bkpack.h"
install -m 644 "$built/libbkpack.a" "$prefix/lib/libbkpack.a"
install -m 755 "$built/libbkpack.so" "$prefix/lib/libbkpack.so.$version"
# Programs ask for the first number alone, the linker for none.
ln -sf "libbkpack.so.$version" "$prefix/lib/libbkpack.so.${version%%.*}"
ln -sf "libbkpack.so.${version%%.*}" "$prefix/lib/libbkpack.so"
cat > "$prefix/lib/pkgconfig/bkpack.pc" <<PC
prefix=\${pcfiledir}/../..
Name: bkpack
Description: Packed language models, read and multiplied as they lie on disk
Version: $version
Cflags: -I\${prefix}/include
Libs: -L\${prefix}/lib -lbkpack
Libs.private: -lgcc_s -lutil -lrt -lpthread -lm -ldl
PC
