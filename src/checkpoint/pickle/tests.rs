//! What the stack machine makes of pickles, sound and broken.

use super::*;

fn load(bytes: &[u8]) -> Result<Pickle<'_>, PickleError> {
    read(bytes, |module, _| module == "collections" || module == "torch")
}

fn why(bytes: &[u8]) -> String {
    match load(bytes).unwrap_err() {
        PickleError::Broken(why) => why,
        PickleError::Global(global) => panic!("{global}"),
    }
}

/// `{"a": (1, -2, 2**40), "b": [True, OrderedDict()]}` as CPython writes it in protocols 0, 2 and 4.
#[test]
fn every_protocol_gives_the_same_values() {
    let zero: &[u8] =
        b"(dp0\nVa\np1\n(I1\nI-2\nL1099511627776L\ntp2\nsVb\np3\n(lp4\nI01\naccollections\nOrderedDict\np5\n(tRp6\nas.";
    let two = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01J\xfe\xff\xff\xff\x8a\x06\x00\x00\x00\x00\x00\x01\x87q\x02X\x01\x00\x00\x00bq\x03]q\x04(\x88ccollections\nOrderedDict\nq\x05)Rq\x06eu.";
    let four = b"\x80\x04\x95\x40\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94K\x01J\xfe\xff\xff\xff\x8a\x06\x00\x00\x00\x00\x00\x01\x87\x94\x8c\x01b\x94]\x94(\x88\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94eu.";
    for bytes in [zero, two, four] {
        let pickle = load(bytes).unwrap();
        assert_eq!(pickle.end, bytes.len());
        let Value::Tuple(numbers) = &pickle[pickle.get(pickle.root, "a").unwrap()] else { panic!("no tuple") };
        assert_eq!(numbers.iter().map(|&id| pickle.size(id)).collect::<Vec<_>>(), [Some(1), None, Some(1 << 40)]);
        let Value::List(items) = &pickle[pickle.get(pickle.root, "b").unwrap()] else { panic!("no list") };
        assert!(matches!(pickle[items[0]], Value::Bool(true)));
        assert!(matches!(&pickle[items[1]], Value::Dict(pairs) if pairs.is_empty()));
        // Truncated anywhere it is refused.
        for end in 0..bytes.len() {
            assert!(load(&bytes[..end]).is_err(), "{end}");
        }
    }
}

#[test]
fn a_global_that_is_not_allowed_is_named_in_full() {
    let forbidden = Err(PickleError::Global("os.system".into()));
    assert_eq!(load(b"cos\nsystem\n(S'true'\ntR.").map(|_| ()), forbidden);
    assert_eq!(load(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.").map(|_| ()), forbidden);
}

#[test]
fn recursion_sharing_and_depth_cost_nothing() {
    // A list that holds itself, and a million lists one inside the other.
    assert!(load(b"]q\x00h\x00a.").is_ok());
    let deep = [vec![b']'; 1_000_000], vec![b'a'; 999_999], vec![b'.']].concat();
    assert!(load(&deep).is_ok());
    // Thirty doublings: 2^30 leaves if they were copied.
    let mut bomb = b"]q\x00".to_vec();
    for level in 0..30u8 {
        bomb.extend([b']', b'q', level + 1, b'h', level, b'a', b'h', level, b'a']);
    }
    bomb.push(b'.');
    assert!(load(&bomb).unwrap().values().len() < 100);
}

#[test]
fn what_a_pickle_makes_is_bounded_whatever_it_makes() {
    let refused = |bytes: &[u8]| assert!(why(bytes).contains("8 million"));
    // Values, the stack, marks, and memo entries that all name one value.
    refused(&[b'N', b'0'].repeat(MAX_MADE + 1));
    refused(&[vec![b'N'], vec![b'2'; MAX_MADE]].concat());
    refused(&vec![b'('; MAX_MADE + 1]);
    refused(&[vec![b'N'], vec![0x94; MAX_MADE]].concat());
    // Entries of one list that is dropped again and again, and one list of a thousand given to every call.
    refused(&[b"]", &b"(NNNNNNe"[..].repeat(MAX_MADE / 12 + 1)[..]].concat());
    let list = [b"](", &b"N"[..].repeat(1000)[..], b"eq\x00ccollections\nOrderedDict\nq\x01"].concat();
    refused(&[&list[..], &b"h\x01h\x00\x85R0"[..].repeat(MAX_MADE / 2000)[..]].concat());
}

#[test]
fn lengths_are_checked_before_anything_is_made() {
    for bytes in [&b"X\xff\xff\xff\xff"[..], b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"Ixxx"]
    {
        assert!(why(bytes).contains("truncated"), "{bytes:?}");
    }
    for (bytes, words) in [
        (&b"."[..], "empty stack"),
        (b"(.", "empty stack"),
        (b"Nt.", "mark"),
        (b"h\x00.", "not made"),
        (b"]K\x01u", "mark"),
        (b"}(Nu", "without a value"),
        (b"NNR", "no tuple"),
        (b"N)R", "no global"),
        (b"\x80\x02\x82\x01.", "opcode 0x82 at byte 2"),
        (b"iposix\nsystem\n.", "opcode 0x69"),
    ] {
        assert!(why(bytes).contains(words), "{bytes:?}: {}", why(bytes));
    }
}
