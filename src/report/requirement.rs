//! Claims with a number, and whether what was measured bears them out.

use serde::{Serialize, Serializer, ser::SerializeStruct};

/// A measured number that a claim is about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measured {
    Finite(f64),
    /// It was measured, and is NaN or infinite.
    NotFinite,
    /// Nothing measured it.
    Missing,
}

impl Measured {
    /// A number computed from two others.
    pub fn with(self, other: Self, compute: impl FnOnce(f64, f64) -> f64) -> Self {
        match (self, other) {
            (Self::Finite(a), Self::Finite(b)) => Self::from(compute(a, b)),
            (Self::Missing, _) | (_, Self::Missing) => Self::Missing,
            _ => Self::NotFinite,
        }
    }

    /// The number, if there is a finite one.
    pub fn finite(self) -> Option<f64> {
        if let Self::Finite(value) = self { Some(value) } else { None }
    }
}

impl From<f64> for Measured {
    fn from(value: f64) -> Self {
        if value.is_finite() { Self::Finite(value) } else { Self::NotFinite }
    }
}

/// On which side of the threshold the claim holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Below,
    Above,
    AtLeast,
}

impl Side {
    /// As in a comparison.
    pub fn sign(self) -> &'static str {
        match self {
            Side::Below => "<",
            Side::Above => ">",
            Side::AtLeast => ">=",
        }
    }
}

/// A claim by the name it has in the documents that make it.
#[derive(Clone, Debug, PartialEq)]
pub struct Requirement {
    pub id: &'static str,
    pub description: &'static str,
    pub value: Measured,
    pub side: Side,
    pub threshold: f64,
}

impl Requirement {
    /// `PASS`, `FAIL` (a value that is not finite fails every claim), or `MISSING` where nothing was measured.
    pub fn status(&self) -> &'static str {
        let holds = match (self.value, self.side) {
            (Measured::Missing, _) => return "MISSING",
            (Measured::NotFinite, _) => false,
            (Measured::Finite(value), Side::Below) => value < self.threshold,
            (Measured::Finite(value), Side::Above) => value > self.threshold,
            (Measured::Finite(value), Side::AtLeast) => value >= self.threshold,
        };
        if holds { "PASS" } else { "FAIL" }
    }

    /// The line for people.
    pub fn line(&self) -> String {
        let mark = match self.status() {
            "PASS" => "✓ ",
            "FAIL" => "✗ ",
            _ => "",
        };
        let value = match self.value {
            Measured::Finite(value) => format!("value {value:.2}"),
            Measured::NotFinite => "no finite value".into(),
            Measured::Missing => "not measured".into(),
        };
        let sign = self.side.sign();
        format!("{}: {mark}{}  ({value}, required {sign} {})", self.id, self.status(), self.threshold)
    }
}

impl Serialize for Requirement {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Requirement", 5)?;
        fields.serialize_field("description", self.description)?;
        fields.serialize_field("value", &self.value.finite())?;
        let side = match self.side {
            Side::Below => "below",
            Side::Above => "above",
            Side::AtLeast => "at least",
        };
        fields.serialize_field("required", side)?;
        fields.serialize_field("threshold", &self.threshold)?;
        fields.serialize_field("status", self.status())?;
        fields.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_pass_fail_or_are_missing() {
        let requirement = |value, side| Requirement { id: "r", description: "d", value, side, threshold: 5.0 };
        let status = |value, side| requirement(value, side).status();
        assert_eq!(status(Measured::from(4.9), Side::Below), "PASS");
        assert_eq!(status(Measured::from(5.0), Side::Below), "FAIL");
        assert_eq!(status(Measured::from(5.0), Side::Above), "FAIL");
        assert_eq!(status(Measured::from(5.0), Side::AtLeast), "PASS");
        assert_eq!(status(Measured::from(f64::INFINITY), Side::Above), "FAIL");
        assert_eq!(status(Measured::Missing, Side::Above), "MISSING");
        let ratio = Measured::from(1.0).with(Measured::from(0.0), |a, b| a / b);
        assert_eq!(ratio, Measured::NotFinite);
        assert_eq!(Measured::NotFinite.with(Measured::Missing, f64::max), Measured::Missing);
        assert_eq!(requirement(Measured::from(4.0), Side::Below).line(), "r: ✓ PASS  (value 4.00, required < 5)");
    }
}
