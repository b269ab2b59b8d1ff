//! The header of a NumPy array file (.npy), versions 1 to 3.

use super::dtype::Element;

/// What every .npy file starts with.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// The most bytes that a header takes here, its length field included: real ones take 128.
pub(super) const MAX_HEADER: usize = 1 << 16;

/// What a header says.
#[derive(Debug, PartialEq)]
pub(super) struct Header {
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    /// Whether the first dimension is the fastest.
    pub fortran: bool,
    /// Where the values start.
    pub data_start: usize,
}

/// An array's element type.
#[derive(Debug, PartialEq)]
pub(super) enum Dtype {
    Float {
        element: Element,
        complex: bool,
        big_endian: bool,
    },
    /// A type that is no float, by its NumPy name.
    Other(String),
}

/// Reads the header from the first bytes of an array file, [`MAX_HEADER`] of them at most.
///
/// # Errors
/// A sentence about the rule that is broken.
pub(super) fn read(head: &[u8]) -> Result<Header, String> {
    let truncated = || "the array's header is truncated or longer than 64 KiB".to_owned();
    let (magic, rest) = head.split_at_checked(MAGIC.len()).ok_or_else(truncated)?;
    if magic != MAGIC {
        return Err("is no .npy array: it does not start with \\x93NUMPY".into());
    }
    let (length, text_start) = match rest {
        [1, _, low, high, ..] => (usize::from(u16::from_le_bytes([*low, *high])), 10),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, 12),
        [version @ (0 | 4..), ..] => return Err(format!("has version {version} of the .npy format; 1 to 3 are read")),
        _ => return Err(truncated()),
    };
    let data_start = text_start + length;
    let text = head.get(text_start..data_start).ok_or_else(truncated)?;
    let text = std::str::from_utf8(text).map_err(|_| "the array's header is not UTF-8")?;
    let (descr, fortran, shape) = Parser(text).header().ok_or_else(|| {
        format!("the array's header is not a dictionary of descr, fortran_order and shape: {:?}", clip(text))
    })?;
    Ok(Header { shape, dtype: dtype(&descr)?, fortran, data_start })
}

fn clip(text: &str) -> &str {
    &text[..text.char_indices().nth(80).map_or(text.len(), |(end, _)| end)]
}

fn dtype(descr: &Descr) -> Result<Dtype, String> {
    let Descr::Plain(descr) = descr else { return Err("is a structured array; save its fields as arrays".into()) };
    let kind = descr.trim_start_matches(['<', '>', '=', '|']);
    let order = &descr[..descr.len() - kind.len()];
    let (element, complex) = match kind {
        "O" => return Err("holds Python objects (a pickle), which are never loaded; save plain float arrays".into()),
        "f2" => (Element::F16, false),
        "f4" => (Element::F32, false),
        "f8" => (Element::F64, false),
        "c8" => (Element::F32, true),
        "c16" => (Element::F64, true),
        _ => return Ok(Dtype::Other(descr.clone())),
    };
    match order {
        "<" => Ok(Dtype::Float { element, complex, big_endian: false }),
        ">" => Ok(Dtype::Float { element, complex, big_endian: true }),
        _ => Err(format!("has type {descr:?} without a byte order")),
    }
}

/// The value of `descr`.
enum Descr {
    Plain(String),
    /// A list of fields.
    Structured,
}

/// A reader of the one Python literal that a header is.
struct Parser<'a>(&'a str);

impl<'a> Parser<'a> {
    /// `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }` and white space, the keys in any order.
    fn header(mut self) -> Option<(Descr, bool, Vec<usize>)> {
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        self.token("{")?;
        while self.token("}").is_none() {
            let key = self.string()?;
            self.token(":")?;
            let fresh = match key {
                "descr" if self.0.trim_start().starts_with('[') => {
                    self.fields()?;
                    descr.replace(Descr::Structured).is_none()
                }
                "descr" => descr.replace(Descr::Plain(self.string()?.to_owned())).is_none(),
                "fortran_order" => fortran.replace(self.boolean()?).is_none(),
                "shape" => shape.replace(self.tuple()?).is_none(),
                _ => return None,
            };
            if !fresh || self.token(",").is_none() && !self.0.trim_start().starts_with('}') {
                return None;
            }
        }
        self.0.trim().is_empty().then_some((descr?, fortran?, shape?))
    }

    /// Steps over white space and this token, if it comes next.
    fn token(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let rest = self.0.trim_start();
        let quote = rest.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (text, rest) = rest[1..].split_once(quote)?;
        self.0 = rest;
        (!text.contains('\\')).then_some(text)
    }

    fn boolean(&mut self) -> Option<bool> {
        match self.token("True") {
            Some(()) => Some(true),
            None => self.token("False").map(|()| false),
        }
    }

    /// `()`, `(3,)`, `(3, 4)`; NumPy allows at most 64 dimensions.
    fn tuple(&mut self) -> Option<Vec<usize>> {
        let mut sizes = Vec::new();
        let mut comma = true;
        self.token("(")?;
        while self.token(")").is_none() {
            let rest = self.0.trim_start();
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            if !comma || sizes.len() == 64 {
                return None;
            }
            sizes.push(rest[..end].parse().ok()?);
            self.0 = &rest[end..];
            comma = self.token(",").is_some();
        }
        // `(3)` is a number in Python.
        (sizes.len() != 1 || comma).then_some(sizes)
    }

    /// Steps over the fields of a structured array without reading them: the list must only end.
    fn fields(&mut self) -> Option<()> {
        let end = self.0.rfind(']')?;
        self.0 = &self.0[end + 1..];
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u8, text: &str) -> Vec<u8> {
        let mut bytes = [MAGIC, &[version, 0]].concat();
        match version {
            1 => bytes.extend((text.len() as u16).to_le_bytes()),
            _ => bytes.extend((text.len() as u32).to_le_bytes()),
        }
        [&bytes, text.as_bytes()].concat()
    }

    #[test]
    fn headers_of_every_version_are_read() {
        let text = "{'descr': '>c16', 'fortran_order': True, 'shape': (2, 3), }     \n";
        for (version, data_start) in [(1, 10 + text.len()), (2, 12 + text.len()), (3, 12 + text.len())] {
            let dtype = Dtype::Float { element: Element::F64, complex: true, big_endian: true };
            let expected = Header { shape: vec![2, 3], dtype, fortran: true, data_start };
            assert_eq!(read(&header(version, text)), Ok(expected));
        }
        let scalar = read(&header(1, "{\"shape\": (), \"descr\": \"<f2\", \"fortran_order\": False}")).unwrap();
        assert!(scalar.shape.is_empty());
        assert_eq!(read(&header(1, "{'descr':'|b1','fortran_order':False,'shape':(3,)}")).unwrap().shape, [3]);
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let fields = "'descr': '<f4', 'fortran_order': False";
        for text in [
            String::new(),
            "{}".into(),
            format!("{{{fields}}}"),
            format!("{{{fields}, 'shape': (3)}}"),
            format!("{{{fields}, 'shape': (,)}}"),
            format!("{{{fields}, 'shape': (3 4)}}"),
            format!("{{{fields}, 'shape': (-3,)}}"),
            format!("{{{fields}, 'shape': (99999999999999999999999,)}}"),
            format!("{{{fields}, 'shape': ({})}}", "1,".repeat(65)),
            format!("{{{fields}, 'shape': (3,)"),
            format!("{{{fields}, 'shape': (3,)}} x"),
            format!("{{{fields}, 'shape': (3,), 'shape': (3,)}}"),
            format!("{{{fields}, 'shape': (3,), 'more': 1}}"),
            format!("{{{fields}, 'shape': __import__('os')}}"),
        ] {
            let why = read(&header(1, &text)).unwrap_err();
            assert!(why.contains("not a dictionary"), "{text}: {why}");
        }
        let whole = header(1, &format!("{{{fields}, 'shape': (3,)}}"));
        for end in 0..whole.len() {
            assert!(read(&whole[..end]).unwrap_err().contains("truncated"), "{end}");
        }
        for (descr, why) in [("'|O'", "pickle"), ("'f4'", "byte order"), ("[('a', '<f4')]", "structured")] {
            let text = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': (3,)}}");
            assert!(read(&header(1, &text)).unwrap_err().contains(why), "{descr}");
        }
        assert!(read(b"\x93NUMPY\x04\x00\x00\x00").unwrap_err().contains("version 4"));
    }
}
