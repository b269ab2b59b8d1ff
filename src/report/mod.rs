//! Plain records of what was done and measured, and the tables that show them.

pub mod convert;
pub mod table;
