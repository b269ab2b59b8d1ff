//! The README shows code that runs.

/// Its Rust is that of the crate's documentation, which is compiled and run as a documentation test.
#[test]
fn the_rust_of_the_readme_is_documentation() {
    let (readme, library) = (include_str!("../README.md"), include_str!("../src/lib.rs"));
    let shown: Vec<&str> = readme.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(shown.len(), 1, "one block of Rust");
    // Lines that rustdoc hides are needed to run it, not to read it.
    let visible = library.lines().filter(|line| !line.starts_with("//! #"));
    let documented: Vec<&str> =
        visible.map(|line| line.strip_prefix("//!").unwrap_or(line)).map(str::trim_start).collect();
    let lines: Vec<&str> = shown[0].lines().map(str::trim_start).collect();
    assert!(lines.len() > 5 && documented.windows(lines.len()).any(|window| window == lines));
}
