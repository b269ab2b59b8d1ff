//! The header is the one that follows from the source.

use std::{fs, path::Path};

#[test]
fn header_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let sources = ["src/types.rs", "src/lib.rs"];
    let builder = sources.iter().fold(cbindgen::Builder::new(), |builder, source| builder.with_src(root.join(source)));
    let mut generated = Vec::new();
    builder.with_config(config).generate().unwrap().write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();

    let path = root.join("include/bkpack.h");
    if std::env::var_os("BKPACK_WRITE_HEADER").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == generated,
        "{} is not what the source gives; BKPACK_WRITE_HEADER=1 cargo test -p bkpack-capi --test header writes it",
        path.display()
    );
}
