//! Python pickles as plain data. A pickle is a program for a small stack machine; here it builds values in an arena and
//! nothing else: a call is recorded, never made, and a global that is not expected ends the reading.
//!
//! The opcodes are those of CPython's `pickletools`, protocols 0 to 5, without persistent names in text, extension
//! codes, the class opcodes of protocol 0 and out-of-band buffers.

use std::{collections::HashMap, ops::Index};

/// Bytes of one pickle: tensors lie outside it, so real ones are far smaller.
const MAX_BYTES: usize = 64 << 20;

/// Values and stack entries of one pickle.
const MAX_VALUES: usize = 8 << 20;

/// Which value of the arena.
pub(super) type Id = u32;

/// A value; those inside it are named by id, so shared and recursive ones cost nothing.
#[derive(Debug)]
pub(super) enum Value<'a> {
    Int(i64),
    Bool(bool),
    /// Text or bytes.
    Text(&'a [u8]),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(&'a str, &'a str),
    /// A call that was not made.
    Call {
        function: Id,
        arguments: Id,
    },
    /// A reference to something outside the pickle.
    Persistent(Id),
    /// What no tensor is made of: None, floats, large integers, sets.
    Other,
}

/// One pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    /// What the pickle stands for.
    pub root: Id,
    /// Bytes that it took.
    pub end: usize,
}

impl<'a> Index<Id> for Pickle<'a> {
    type Output = Value<'a>;
    fn index(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize]
    }
}

impl<'a> Pickle<'a> {
    /// Every value, in the order in which they were made.
    pub fn values(&self) -> &[Value<'a>] {
        &self.values
    }

    /// Text that is UTF-8.
    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self[id] {
            Value::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// A size or an offset.
    pub fn size(&self, id: Id) -> Option<usize> {
        match self[id] {
            Value::Int(value) => usize::try_from(value).ok(),
            _ => None,
        }
    }

    /// The value of a text key; Python keeps the last of equal keys.
    pub fn get(&self, dict: Id, key: &str) -> Option<Id> {
        let Value::Dict(pairs) = &self[dict] else { return None };
        pairs.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }
}

/// Why a pickle was not read.
#[derive(Debug, PartialEq)]
pub(super) enum PickleError {
    /// It names this global, which is not allowed.
    Global(String),
    /// It breaks a rule of pickles.
    Broken(String),
}

/// Reads the pickle that `bytes` start with. `allowed` says of a module and a name whether the pickle may mention them.
///
/// Time and memory are bounded by the bytes read: no opcode makes more than one value, nothing is copied.
pub(super) fn read<'a>(bytes: &'a [u8], allowed: fn(&str, &str) -> bool) -> Result<Pickle<'a>, PickleError> {
    let bytes = &bytes[..bytes.len().min(MAX_BYTES)];
    let mut machine = Machine {
        bytes,
        at: 0,
        allowed,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        let start = machine.at;
        let opcode = machine.byte()?;
        if opcode == b'.' {
            let root = machine.pop()?;
            return Ok(Pickle { values: machine.values, root, end: machine.at });
        }
        machine.step(opcode, start)?;
        if machine.values.len() > MAX_VALUES || machine.stack.len() > MAX_VALUES {
            return Err(broken("the pickle makes more than 8 million values"));
        }
    }
}

fn broken(why: &str) -> PickleError {
    PickleError::Broken(why.into())
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    allowed: fn(&str, &str) -> bool,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    fn step(&mut self, opcode: u8, start: usize) -> Result<(), PickleError> {
        match opcode {
            // Protocol and frame lengths say nothing that matters here.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }

            b'N' | b'G' => {
                self.take(if opcode == b'G' { 8 } else { 0 })?;
                self.push(Value::Other);
            }
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'K' => self.push_integer(1)?,
            b'M' => self.push_integer(2)?,
            b'J' => {
                let value = i32::from_le_bytes(self.take(4)?.try_into().expect("four bytes"));
                self.push(Value::Int(value.into()));
            }
            0x8a => self.push_long(1)?,
            0x8b => self.push_long(4)?,
            b'I' => {
                let value = match self.line()? {
                    "00" => Value::Bool(false),
                    "01" => Value::Bool(true),
                    text => text.parse().map_or(Value::Other, Value::Int),
                };
                self.push(value);
            }
            b'L' => {
                let value = self.line()?.trim_end_matches('L').parse().map_or(Value::Other, Value::Int);
                self.push(value);
            }
            b'F' => {
                self.line()?;
                self.push(Value::Other);
            }

            b'U' | 0x8c | b'C' => self.push_text(1)?,
            b'T' | b'X' | b'B' => self.push_text(4)?,
            0x8d | 0x8e | 0x96 => self.push_text(8)?,
            b'V' => {
                let text = self.line()?.as_bytes();
                self.push(Value::Text(text));
            }
            b'S' => {
                let line = self.line()?;
                let text = line.strip_prefix(['\'', '"']).and_then(|rest| rest.strip_suffix(['\'', '"']));
                self.push(Value::Text(text.ok_or_else(|| broken("the pickle has text without quotes"))?.as_bytes()));
            }

            b')' => self.push(Value::Tuple(Vec::new())),
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Value::Tuple(items));
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            b']' => self.push(Value::List(Vec::new())),
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Value::List(items));
            }
            b'a' => {
                let items = self.pop_many(1)?;
                self.append(items)?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Dict(Vec::new()));
                self.set_items(items)?;
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            0x8f => self.push(Value::Other),
            0x90 => drop(self.pop_to_mark()?),
            0x91 => {
                self.pop_to_mark()?;
                self.push(Value::Other);
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(module, name)?;
            }
            0x93 => {
                let names = self.pop_many(2)?;
                let text = |id: Id| match self.values[id as usize] {
                    Value::Text(bytes) => std::str::from_utf8(bytes).ok(),
                    _ => None,
                };
                let (Some(module), Some(name)) = (text(names[0]), text(names[1])) else {
                    return Err(broken("the pickle names a global by something that is no text"));
                };
                self.push_global(module, name)?;
            }
            b'R' | 0x81 => self.call()?,
            0x92 => {
                self.pop()?; // keyword arguments
                self.call()?;
            }
            // The state of an object: no tensor is made of it, and a dict keeps its entries without it.
            b'b' => drop(self.pop()?),
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }

            b'q' => self.put_numbered(1)?,
            b'r' => self.put_numbered(4)?,
            b'p' => {
                let key = self.line_number()?;
                self.put(key)?;
            }
            0x94 => self.put(self.memo.len() as u64)?,
            b'h' => self.get_numbered(1)?,
            b'j' => self.get_numbered(4)?,
            b'g' => {
                let key = self.line_number()?;
                self.get(key)?;
            }
            _ => return Err(PickleError::Broken(format!("the pickle has opcode {opcode:#04x} at byte {start}"))),
        }
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PickleError> {
        let taken = self.at.checked_add(length).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| match self.bytes.len() {
            MAX_BYTES => broken("the pickle is longer than 64 MiB"),
            _ => broken("the pickle is truncated"),
        })?;
        self.at += length;
        Ok(taken)
    }

    /// A little-endian number of `width` bytes.
    fn number(&mut self, width: usize) -> Result<u64, PickleError> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(self.take(width)?);
        Ok(u64::from_le_bytes(bytes))
    }

    /// Up to the next line feed.
    fn line(&mut self) -> Result<&'a str, PickleError> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
        let line = self.take(length)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| broken("the pickle has a line that is not UTF-8"))
    }

    fn line_number(&mut self) -> Result<u64, PickleError> {
        self.line()?.parse().map_err(|_| broken("the pickle has a memo key that is no number"))
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
    }

    fn push_integer(&mut self, width: usize) -> Result<(), PickleError> {
        let value = self.number(width)?;
        self.push(Value::Int(value as i64));
        Ok(())
    }

    /// An integer in two's complement whose length is given first.
    fn push_long(&mut self, width: usize) -> Result<(), PickleError> {
        let length = self.number(width)? as usize;
        let bytes = self.take(length)?;
        let value = match bytes.last() {
            None => Value::Int(0),
            Some(_) if bytes.len() > 8 => Value::Other,
            Some(last) => {
                let mut wide = [if last & 0x80 == 0 { 0 } else { 0xff }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(wide))
            }
        };
        self.push(value);
        Ok(())
    }

    fn push_text(&mut self, width: usize) -> Result<(), PickleError> {
        let length = usize::try_from(self.number(width)?).unwrap_or(usize::MAX);
        let text = self.take(length)?;
        self.push(Value::Text(text));
        Ok(())
    }

    fn push_global(&mut self, module: &'a str, name: &'a str) -> Result<(), PickleError> {
        if !(self.allowed)(module, name) {
            return Err(PickleError::Global(format!("{module}.{name}")));
        }
        self.push(Value::Global(module, name));
        Ok(())
    }

    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        Ok(self.pop_many(1)?[0])
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, PickleError> {
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= self.floor());
        Ok(self.stack.split_off(start.ok_or_else(|| broken("the pickle takes from an empty stack"))?))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| broken("the pickle lacks a mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<Id, PickleError> {
        match self.stack.last() {
            Some(&top) if self.stack.len() > self.floor() => Ok(top),
            _ => Err(broken("the pickle takes from an empty stack")),
        }
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let top = self.top()?;
        if let Value::List(list) = &mut self.values[top as usize] {
            list.extend(items);
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let top = self.top()?;
        if items.len() % 2 == 1 {
            return Err(broken("the pickle has a key without a value"));
        }
        if let Value::Dict(pairs) = &mut self.values[top as usize] {
            pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        }
        Ok(())
    }

    /// Records a call; that of `OrderedDict` gives a dict.
    fn call(&mut self) -> Result<(), PickleError> {
        let [function, arguments] = self.pop_many(2)?[..] else { unreachable!("two were popped") };
        let Value::Tuple(items) = &self.values[arguments as usize] else {
            return Err(broken("the pickle calls with arguments that are no tuple"));
        };
        let value = match self.values[function as usize] {
            Value::Global("collections", "OrderedDict" | "defaultdict") => Value::Dict(self.pairs(items)),
            Value::Global(..) => Value::Call { function, arguments },
            _ => return Err(broken("the pickle calls what is no global")),
        };
        self.push(value);
        Ok(())
    }

    /// What `OrderedDict([(key, value), ...])` is given; protocol 0 of old Pythons writes it so.
    fn pairs(&self, arguments: &[Id]) -> Vec<(Id, Id)> {
        let [list] = arguments else { return Vec::new() };
        let Value::List(items) = &self.values[*list as usize] else { return Vec::new() };
        let pair = |id: &Id| match &self.values[*id as usize] {
            Value::Tuple(pair) | Value::List(pair) => <[Id; 2]>::try_from(pair.as_slice()).ok(),
            _ => None,
        };
        items.iter().filter_map(pair).map(|[key, value]| (key, value)).collect()
    }

    fn put(&mut self, key: u64) -> Result<(), PickleError> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn put_numbered(&mut self, width: usize) -> Result<(), PickleError> {
        let key = self.number(width)?;
        self.put(key)
    }

    fn get(&mut self, key: u64) -> Result<(), PickleError> {
        let value = self.memo.get(&key).ok_or_else(|| broken("the pickle refers to what it has not made"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn get_numbered(&mut self, width: usize) -> Result<(), PickleError> {
        let key = self.number(width)?;
        self.get(key)
    }
}

#[cfg(test)]
mod tests {
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
        let zero: &[u8] = b"(dp0\nVa\np1\n(I1\nI-2\nL1099511627776L\ntp2\nsVb\np3\n(lp4\nI01\naccollections\nOrderedDict\np5\n(tRp6\nas.";
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
        assert!(why(&vec![b'N'; MAX_VALUES + 2]).contains("8 million"));
        assert!(why(&[vec![b'N'], vec![b'2'; MAX_VALUES + 2]].concat()).contains("8 million"));
    }

    #[test]
    fn lengths_are_checked_before_anything_is_made() {
        for bytes in
            [&b"X\xff\xff\xff\xff"[..], b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"Ixxx"]
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
}
