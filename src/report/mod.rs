//! Plain records of what was done and measured, and the tables and figures that show them.

pub mod convert;
pub mod figure;
pub mod importance;
pub mod table;
