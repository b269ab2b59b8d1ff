//! Python pickles as plain data. A pickle is a program for a small stack machine; here it builds values in an arena and
//! nothing else: a call is recorded, never made, and a global that is not expected ends the reading.
//!
//! The opcodes are those of CPython's `pickletools`, protocols 0 to 5, without persistent names in text, extension
//! codes, the class opcodes of protocol 0 and out-of-band buffers.

use std::{collections::HashMap, ops::Index};

/// Bytes of one pickle: tensors lie outside it and take about 300 bytes each, so real ones are far smaller.
pub(super) const MAX_BYTES: usize = 32 << 20;

/// What one pickle may make: values, entries of tuples, lists and dicts, and what is on the stack or remembered. A
/// tensor takes about 40; no kind takes more than some 50 bytes of memory.
const MAX_MADE: usize = 8 << 20;

/// Bytes of a name or a key: the longest names in use are a tenth of this.
const MAX_TEXT: usize = 1024;

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

    /// Text that is UTF-8 and short enough to be a name: the same text may be asked for once for every tensor.
    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self[id] {
            Value::Text(bytes) if bytes.len() <= MAX_TEXT => std::str::from_utf8(bytes).ok(),
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
        let is_key = |id: Id| matches!(self[id], Value::Text(bytes) if bytes == key.as_bytes());
        pairs.iter().rev().find(|(id, _)| is_key(*id)).map(|(_, value)| *value)
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
/// Time and memory are bounded by [`MAX_BYTES`] and [`MAX_MADE`]: an opcode makes one value at most, and what it moves or
/// copies into a container is counted before it is copied, whether or not the container is ever used.
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
        entries: 0,
    };
    loop {
        let start = machine.at;
        let opcode = machine.byte()?;
        if opcode == b'.' {
            let root = machine.pop()?;
            return Ok(Pickle { values: machine.values, root, end: machine.at });
        }
        machine.step(opcode, start)?;
        machine.charge(0)?;
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
    /// Entries that were put into containers.
    entries: usize,
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
                self.push_tuple(items)?;
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items)?;
            }
            b']' => self.push(Value::List(Vec::new())),
            b'l' => {
                let items = self.pop_to_mark()?;
                self.charge(items.len())?;
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
            MAX_BYTES => broken("the pickle is longer than 32 MiB"),
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

    fn push_tuple(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        self.charge(items.len())?;
        self.push(Value::Tuple(items));
        Ok(())
    }

    /// Counts entries that a container takes in; the pickle as a whole may make only so much.
    fn charge(&mut self, entries: usize) -> Result<(), PickleError> {
        self.entries += entries;
        let made = self.values.len() + self.stack.len() + self.marks.len() + self.memo.len() + self.entries;
        match made {
            ..=MAX_MADE => Ok(()),
            _ => Err(broken("the pickle makes more than 8 million values and entries")),
        }
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
        self.charge(items.len())?;
        let top = self.top()?;
        if let Value::List(list) = &mut self.values[top as usize] {
            list.extend(items);
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        self.charge(items.len())?;
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
            Value::Global("collections", "OrderedDict" | "defaultdict") => match items[..] {
                [list] => Value::Dict(self.pairs(list)?),
                _ => Value::Dict(Vec::new()),
            },
            Value::Global(..) => Value::Call { function, arguments },
            _ => return Err(broken("the pickle calls what is no global")),
        };
        self.push(value);
        Ok(())
    }

    /// What `OrderedDict([(key, value), ...])` is given; protocol 0 of old Pythons writes it so.
    fn pairs(&mut self, list: Id) -> Result<Vec<(Id, Id)>, PickleError> {
        let Value::List(items) = &self.values[list as usize] else { return Ok(Vec::new()) };
        // All are looked at and none is taken, so the next call may be given the same list.
        let entries = 2 * items.len();
        self.charge(entries)?;
        let Value::List(items) = &self.values[list as usize] else { unreachable!("it was a list above") };
        let pair = |id: &Id| match &self.values[*id as usize] {
            Value::Tuple(pair) | Value::List(pair) => <[Id; 2]>::try_from(pair.as_slice()).ok(),
            _ => None,
        };
        Ok(items.iter().filter_map(pair).map(|[key, value]| (key, value)).collect())
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
mod tests;
