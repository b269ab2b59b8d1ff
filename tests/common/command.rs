//! What tests of the command ask of its output.

use std::process::Output;

/// Asserts an exit status of 0; returns what was printed.
#[track_caller]
pub fn succeeded(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Asserts an exit status of 2 and one sentence on standard error, with these words.
#[track_caller]
pub fn refused(output: &Output, words: &[&str]) {
    let message = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && message.trim_end().lines().count() == 1, "{message}");
    words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
}
