#!/usr/bin/env bash
# Builds the CUDA emulator, a libcuda.so.1 for tests on machines without a GPU: build.sh [FOLDER], default target/cuda-emulator
# of the repository. Needs g++ on x86-64. Programs find it where LD_LIBRARY_PATH names the folder.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
cuda="$(dirname "$here")"
out="${1:-$here/../../../target/cuda-emulator}"
mkdir -p "$out/objects"
flags=(-std=c++20 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -DBKPACK_EMULATE -I "$cuda" -Wall -Wno-unknown-pragmas
    -Wno-unused-variable -Wno-maybe-uninitialized)

# A wrapper for each file of kernels lists them: the names that the preprocessor leaves behind the mark.
names=()
list="$out/objects/kernels.cpp"
sources=("$list")
{
    echo '#include "emulate/emulator.h"'
    echo 'using List = std::vector<emulator::Kernel>;'
} > "$list"
for source in "$cuda"/*.cu; do
    name="$(basename "$source" .cu)"
    names+=("$name")
    echo "void list_$name(List&);" >> "$list"
    wrapper="$out/objects/$name.cpp"
    sources+=("$wrapper")
    # Written anew only if it changes, so that what is compiled stays fresh.
    {
        # In a namespace of its own: files may use the same names, and all that is static is this object's.
        echo '#include "emulate/emulator.h"'
        echo "namespace {"
        echo "#include \"$name.cu\""
        echo "}"
        echo "extern char __start_shared_$name[] __attribute__((weak, visibility(\"hidden\")));"
        echo "extern char __stop_shared_$name[] __attribute__((weak, visibility(\"hidden\")));"
        echo "void list_$name(std::vector<emulator::Kernel>& all) {"
        g++ -std=c++20 -E -P -DBKPACK_EMULATE -DBKPACK_LIST -I "$cuda" -x c++ "$source" \
            | tr '\n' ' ' | grep -oE 'KERNEL_ENTRY \([A-Za-z0-9_]+(, *[0-9]+)?\) void +[A-Za-z0-9_]+' \
            | sed -E 's/.*\(([A-Za-z0-9_]+).*\) void +(.*)/    all.push_back(emulator::kernel("\2", \2, \1, {__start_shared_'"$name"', __stop_shared_'"$name"'}));/'
        echo "}"
    } > "$wrapper.new"
    if cmp -s "$wrapper.new" "$wrapper"; then rm "$wrapper.new"; else mv "$wrapper.new" "$wrapper"; fi
done
{
    echo "const List& emulator::kernels() { static const List all = [] { List found;"
    for name in "${names[@]}"; do echo "    list_$name(found);"; done
    echo "    return found; }(); return all; }"
} >> "$list"

# What a file of kernels declares __shared__ is its only static memory: in a section of its own, whose ends the linker names.
build() {
    local name object
    name="$(basename "$1" .cpp)" object="$out/objects/$name.o"
    g++ "${flags[@]}" -c "$1" -o "$object.new"
    if [ -e "$cuda/$name.cu" ]; then
        objcopy --rename-section ".bss=shared_$name,alloc,load,data,contents" "$object.new"
    fi
    mv "$object.new" "$object"
}
objects=()
jobs=()
# Not all that lies there: a file of kernels that is gone has left its wrapper.
for source in "${sources[@]}" "$here"/*.cpp; do
    object="$out/objects/$(basename "$source" .cpp).o"
    objects+=("$object")
    # Headers concern every object, other files their own.
    own=("$source" "$cuda/$(basename "$source" .cpp).cu")
    [ -e "${own[1]}" ] || own=("$source")
    if [ -e "$object" ] && [ -z "$(find "${own[@]}" "$cuda"/*.cuh "$here"/*.h -newer "$object" -print -quit)" ]; then continue; fi
    build "$source" &
    jobs+=($!)
    if [ "${#jobs[@]}" -ge 2 ]; then
        wait "${jobs[0]}"
        jobs=("${jobs[@]:1}")
    fi
done
for job in "${jobs[@]}"; do wait "$job"; done
g++ -shared -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1" "${objects[@]}"
ln -sf libcuda.so.1 "$out/libcuda.so"
echo "$out/libcuda.so.1"
