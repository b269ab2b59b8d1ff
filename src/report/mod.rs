//! Plain records of what was done and measured, and the tables and figures that show them.

pub mod convert;
pub mod efficiency;
pub mod efficiency_figure;
pub mod evaluation;
pub mod export;
pub mod figure;
pub mod importance;
pub mod page;
pub mod requirement;
pub mod results;
pub mod robustness;
pub mod robustness_figure;
pub mod simulate;
pub mod table;
pub mod tensors;
pub mod training;
