//! Perplexity against floating-point operations: the frontier, comparisons, and what the documents claim of them.
//! `efficiency_figure` draws it. Only what was measured counts: nothing is interpolated.

use serde_json::{Value, json};

use super::{
    figure::{display_name, is_mamba, is_resnet_bk},
    requirement::{Measured, Requirement, Side},
    results::{Configuration, protocol_notes},
    robustness::{by_id, choose},
};

/// The perplexity at which the documents compare FLOPs.
pub const TARGET_PPL: f64 = 30.0;

/// A configuration with a finite perplexity.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Index into [`Efficiency::models`].
    pub model: usize,
    pub id: String,
    pub flops: f64,
    pub ppl: f64,
}

/// Configurations of several models.
#[derive(Clone, Debug)]
pub struct Efficiency {
    /// The series, ResNet-BK and Mamba first unless the user names an order. The first two are compared.
    pub models: Vec<String>,
    /// By model, then by FLOPs.
    pub points: Vec<Point>,
    pub target_ppl: f64,
    pub simulated: bool,
    looks_ahead: Vec<bool>,
    notes: Vec<String>,
}

/// Two models where both are at least as good as a perplexity.
#[derive(Clone, Debug, PartialEq)]
pub struct EqualPpl {
    pub ppl: f64,
    /// The configuration of each model with the fewest FLOPs that reaches `ppl`.
    pub points: [Option<Point>; 2],
    /// FLOPs of the second over those of the first. Where the second does not reach `ppl` at all: of its largest
    /// configuration, so that the ratio is more than this.
    pub ratio: Measured,
}

/// Two models within a number of FLOPs.
#[derive(Clone, Debug, PartialEq)]
pub struct EqualFlops {
    pub flops: f64,
    /// The best configuration of each model within `flops`.
    pub points: [Point; 2],
    /// By how much the first model's perplexity is lower, in percent of the second's.
    pub lower_percent: f64,
}

impl Efficiency {
    /// Orders `found`; `models`, where it names any, chooses and orders the series.
    ///
    /// # Errors
    /// A sentence that names a model without results, or says that no perplexity is finite.
    pub fn new(found: &[Configuration], models: &[String], target_ppl: f64) -> Result<Self, String> {
        let models = choose(found.iter().map(|found| found.model.as_str()), models)?;
        let of = |found: &Configuration| models.iter().position(|model| *model == found.model);
        let mut points: Vec<Point> = found
            .iter()
            .filter_map(|found| {
                let Configuration { id, flops, perplexity, .. } = found;
                // Larger values tell nothing more, and would squeeze all others.
                let ppl = perplexity.filter(|ppl| (1e-9..=1e9).contains(ppl))?;
                Some(Point { model: of(found)?, id: id.clone(), flops: *flops, ppl })
            })
            .collect();
        if points.is_empty() {
            return Err("no configuration has a finite perplexity".into());
        }
        points.sort_by(|a, b| a.model.cmp(&b.model).then(a.flops.total_cmp(&b.flops)).then(a.ppl.total_cmp(&b.ppl)));
        let chosen = || found.iter().filter(|found| of(found).is_some());
        let drawn =
            |found: &&Configuration| points.iter().any(|point| point.id == found.id && of(found) == Some(point.model));
        let mut notes = protocol_notes(chosen().map(|found| (found.model.as_str(), found.protocol.as_deref())));
        let broken = chosen().filter(|found| !drawn(found));
        notes.extend(broken.map(|found| format!("the perplexity of {} is not finite: it is not drawn", found.id)));
        let ahead = |model: &String| found.iter().any(|found| found.model == *model && found.looks_ahead);
        let looks_ahead = models.iter().map(ahead).collect();
        let simulated = chosen().any(|found| found.simulated);
        Ok(Self { models, points, target_ppl, simulated, looks_ahead, notes })
    }

    /// Whether the perplexities of a model are those of no language model.
    pub fn looks_ahead(&self, model: usize) -> bool {
        self.looks_ahead[model]
    }

    /// The points of a model by FLOPs.
    pub fn of(&self, model: usize) -> impl Iterator<Item = &Point> + Clone {
        self.points.iter().filter(move |point| point.model == model)
    }

    /// A sentence about each configuration that cannot be drawn, and about results that do not compare.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The points that no other one dominates (fewer FLOPs and no worse, or better at no more FLOPs), by FLOPs.
    pub fn frontier(&self) -> Vec<&Point> {
        let mut by_flops: Vec<&Point> = self.points.iter().collect();
        by_flops.sort_by(|a, b| a.flops.total_cmp(&b.flops).then(a.ppl.total_cmp(&b.ppl)));
        let mut best = f64::INFINITY;
        by_flops.retain(|point| {
            point.ppl < best && {
                best = point.ppl;
                true
            }
        });
        by_flops
    }

    /// The configuration of a model with the fewest FLOPs whose perplexity is at most `ppl`.
    pub fn reaching(&self, model: usize, ppl: f64) -> Option<&Point> {
        self.of(model).find(|point| point.ppl <= ppl)
    }

    /// The best configuration of a model within `flops`.
    fn within(&self, model: usize, flops: f64) -> Option<&Point> {
        self.of(model).filter(|point| point.flops <= flops).min_by(|a, b| a.ppl.total_cmp(&b.ppl))
    }

    /// The first two models at the target, and at the lowest perplexity that both reach.
    pub fn equal_ppl(&self) -> Vec<EqualPpl> {
        let best = |model| self.of(model).map(|point| point.ppl).fold(f64::INFINITY, f64::min);
        let common = best(0).max(best(1));
        let mut targets = vec![self.target_ppl];
        if self.models.len() > 1 && common.is_finite() && common != self.target_ppl {
            targets.push(common);
        }
        targets.into_iter().map(|ppl| self.compare_at(0, 1, ppl)).collect()
    }

    fn compare_at(&self, first: usize, second: usize, ppl: f64) -> EqualPpl {
        let points = [first, second].map(|model| self.reaching(model, ppl).cloned());
        let least = points[0].as_ref().map_or(Measured::NotFinite, |point| Measured::from(point.flops));
        let most = match &points[1] {
            Some(point) => Measured::from(point.flops),
            None => self.of(second).last().map_or(Measured::Missing, |point| Measured::from(point.flops)),
        };
        EqualPpl { ppl, points, ratio: most.with(least, |most, least| most / least) }
    }

    /// The first two models within the fewest FLOPs for which both have a configuration, and within those of each larger
    /// configuration.
    pub fn equal_flops(&self) -> Vec<EqualFlops> {
        let (first, second) = (0, 1);
        let mut budgets: Vec<f64> = self.of(first).chain(self.of(second)).map(|point| point.flops).collect();
        budgets.sort_by(f64::total_cmp);
        budgets.dedup();
        let compared = budgets.into_iter().filter_map(|flops| {
            let points = [self.within(first, flops)?.clone(), self.within(second, flops)?.clone()];
            let lower_percent = lower_percent(&points[0], &points[1]);
            Some(EqualFlops { flops, points, lower_percent })
        });
        compared.collect()
    }

    /// The model all of the frontier belongs to, where others are there to be dominated.
    pub fn dominating(&self) -> Option<usize> {
        let frontier = self.frontier();
        let model = frontier[0].model;
        (self.models.len() > 1 && frontier.iter().all(|point| point.model == model)).then_some(model)
    }

    /// The documents' claims about ResNet-BK and Mamba.
    pub fn requirements(&self) -> Vec<Requirement> {
        let bk = self.models.iter().position(|model| is_resnet_bk(model));
        let mamba = self.models.iter().position(|model| is_mamba(model));
        let both = bk.zip(mamba).filter(|&(bk, mamba)| self.of(bk).next().is_some() && self.of(mamba).next().is_some());
        let at_target = both.map(|(bk, mamba)| self.compare_at(bk, mamba, TARGET_PPL));
        // What a model would need for a perplexity that none of its configurations reaches, nobody measured.
        let ratio = at_target.map_or(Measured::Missing, |it| match it.points {
            [Some(_), Some(_)] => it.ratio,
            _ => Measured::NotFinite,
        });
        let lower = both.map_or(Measured::Missing, |(bk, mamba)| {
            let whole = self.of(mamba).last().map(|point| point.flops);
            let within = whole.and_then(|flops| self.within(bk, flops).zip(self.within(mamba, flops)));
            within.map_or(Measured::NotFinite, |(bk, mamba)| Measured::from(lower_percent(bk, mamba)))
        });
        vec![
            Requirement {
                id: "req_8_10_2x_fewer_flops_at_ppl_30",
                description: "FLOPs that Mamba needs for a perplexity of 30 over those of ResNet-BK (not finite if either \
                              does not reach it)",
                value: ratio,
                side: Side::AtLeast,
                threshold: 2.0,
            },
            Requirement {
                id: "req_8_11_30pct_lower_ppl_at_equal_flops",
                description: "by how many percent ResNet-BK's perplexity is lower than Mamba's within the FLOPs of Mamba's \
                              largest configuration (not finite if ResNet-BK has none within them)",
                value: lower,
                side: Side::AtLeast,
                threshold: 30.0,
            },
        ]
    }

    /// Everything for machines; `notes` are those of reading and drawing.
    pub fn summary(&self, notes: &[String]) -> Value {
        let point = |point: &Point| {
            json!({
                "model": self.models[point.model],
                "config_id": point.id,
                "flops_per_token": point.flops,
                "perplexity": point.ppl,
            })
        };
        let mut models = serde_json::Map::new();
        for (index, model) in self.models.iter().enumerate() {
            let Some(statistics) = self.statistics(index) else { continue };
            let object = json!({
                "name": display_name(model),
                "looks_ahead": self.looks_ahead(index),
                "configurations": self.of(index).count(),
                "best_perplexity": point(statistics.best),
                "lowest_flops": point(statistics.lowest),
                "mean_perplexity": statistics.mean_ppl,
                "mean_flops": statistics.mean_flops,
            });
            models.insert(model.clone(), object);
        }
        let equal_ppl = |it: &EqualPpl| {
            json!({
                "perplexity": it.ppl,
                "configurations": it.points.each_ref().map(|it| it.as_ref().map(point)),
                "flops_ratio": it.ratio.finite(),
                "ratio_is_lower_bound": it.points[0].is_some() && it.points[1].is_none(),
            })
        };
        let equal_flops = |it: &EqualFlops| {
            json!({
                "flops_per_token": it.flops,
                "configurations": it.points.each_ref().map(point),
                "perplexity_lower_percent": it.lower_percent,
            })
        };
        let two = self.models.len() > 1;
        json!({
            "figure": "efficiency",
            "simulated": self.simulated,
            "models": models,
            "pareto_frontier": self.frontier().into_iter().map(point).collect::<Vec<_>>(),
            "dominating_model": self.dominating().map(|model| &self.models[model]),
            "compared": self.models.iter().take(2).collect::<Vec<_>>(),
            "equal_perplexity": if two { self.equal_ppl().iter().map(equal_ppl).collect() } else { Vec::new() },
            "equal_flops": self.equal_flops().iter().map(equal_flops).collect::<Vec<_>>(),
            "requirements": by_id(&self.requirements()),
            "notes": notes,
        })
    }

    fn statistics(&self, model: usize) -> Option<Statistics<'_>> {
        let count = self.of(model).count() as f64;
        Some(Statistics {
            best: self.of(model).min_by(|a, b| a.ppl.total_cmp(&b.ppl))?,
            lowest: self.of(model).next()?,
            mean_ppl: self.of(model).map(|point| point.ppl).sum::<f64>() / count,
            mean_flops: self.of(model).map(|point| point.flops).sum::<f64>() / count,
        })
    }

    /// The summary for people.
    pub fn render(&self) -> String {
        let rule = |mark: char| mark.to_string().repeat(80);
        let mut lines = vec!["Dynamic Efficiency Summary".to_owned(), rule('=')];
        if self.simulated {
            lines.push("SIMULATED data: nothing here was measured".into());
        }
        for (index, model) in self.models.iter().enumerate() {
            let ahead = if self.looks_ahead(index) { " (LOOKS AHEAD: not a language model's perplexity)" } else { "" };
            lines.extend([String::new(), format!("{} Results{ahead}:", display_name(model)), rule('-')]);
            let Some(statistics) = self.statistics(index) else {
                lines.push("no finite perplexity".into());
                continue;
            };
            let Statistics { best, lowest, mean_ppl, mean_flops } = statistics;
            lines.extend([
                format!("Best PPL: {:.2} (at {})", best.ppl, flops(best.flops)),
                format!("Lowest FLOPs: {} (PPL {:.2})", flops(lowest.flops), lowest.ppl),
                format!("Mean: PPL {mean_ppl:.2}, {}", flops(mean_flops)),
                format!("Configurations: {}", self.of(index).count()),
            ]);
        }
        if self.models.len() > 1 {
            let names = [0, 1].map(|model| display_name(&self.models[model]));
            lines.extend([String::new(), "Comparison at Equal PPL:".into(), rule('-')]);
            lines.push(format!("{:<12} {:<18} {:<18} Speedup", "Target PPL", names[0], names[1]));
            for it in self.equal_ppl() {
                let [first, second] =
                    it.points.each_ref().map(|it| it.as_ref().map_or("not reached".into(), |it| flops(it.flops)));
                lines.push(format!("{:<12.2} {first:<18} {second:<18} {}", it.ppl, it.ratio_text()));
            }
            lines.extend([String::new(), "Comparison at Equal FLOPs:".into(), rule('-')]);
            lines.push(format!("{:<12} {:<18} {:<18} Lower by", "Budget", names[0], names[1]));
            for it in self.equal_flops() {
                let [first, second] = it.points.each_ref().map(|it| format!("{:.2}", it.ppl));
                lines.push(format!("{:<12} {first:<18} {second:<18} {:+.1} %", flops(it.flops), it.lower_percent));
            }
        }
        lines.extend([String::new(), "Requirements Verification:".into(), rule('-')]);
        lines.extend(self.requirements().iter().map(Requirement::line));
        lines.join("\n")
    }
}

impl EqualPpl {
    /// `2.31×`, `> 4.62×` where the second model does not reach the perplexity, or why there is none.
    pub fn ratio_text(&self) -> String {
        match (self.ratio.finite(), &self.points) {
            (Some(ratio), [Some(_), Some(_)]) => format!("{ratio:.2}×"),
            (Some(ratio), _) => format!("> {ratio:.2}×"),
            (None, _) => "none".into(),
        }
    }
}

/// By how many percent of the second's perplexity the first's is lower.
fn lower_percent(first: &Point, second: &Point) -> f64 {
    100.0 * (1.0 - first.ppl / second.ppl)
}

struct Statistics<'a> {
    best: &'a Point,
    lowest: &'a Point,
    mean_ppl: f64,
    mean_flops: f64,
}

/// Units of FLOPs, the largest first.
pub(super) const UNITS: [(f64, &str); 5] =
    [(1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs"), (1.0, "FLOPs")];

/// A number of FLOPs in the unit that suits it.
pub(super) fn flops(value: f64) -> String {
    let (size, name) = UNITS.into_iter().find(|(size, _)| value >= *size).unwrap_or(UNITS[4]);
    format!("{:.2} {name}", value / size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(found: &[(&str, f64, f64)]) -> Efficiency {
        let of = |&(model, flops, ppl): &(&str, f64, f64)| Configuration {
            model: model.into(),
            id: format!("{model}_{flops}"),
            perplexity: Some(ppl),
            flops,
            compute_factor: None,
            looks_ahead: false,
            simulated: false,
            protocol: None,
            details: Default::default(),
        };
        Efficiency::new(&found.iter().map(of).collect::<Vec<_>>(), &[], 30.0).unwrap()
    }

    #[test]
    fn frontier_and_comparisons_are_those_of_a_hand_count() {
        let found = points(&[
            ("mamba", 10e9, 32.0),
            ("mamba", 6e9, 36.0),
            ("resnetbk", 5e9, 28.0),
            ("resnetbk", 2e9, 30.0),
            ("resnetbk", 3e9, 31.0),
        ]);
        let frontier: Vec<f64> = found.frontier().iter().map(|point| point.flops).collect();
        assert_eq!((frontier, found.dominating()), (vec![2e9, 5e9], Some(0)));
        let equal = found.equal_ppl();
        // Mamba does not reach 30; at 32, which both reach, it needs 10 and ResNet-BK 2 GFLOPs.
        assert_eq!((equal[0].ratio, equal[0].ratio_text()), (Measured::Finite(5.0), "> 5.00×".into()));
        assert_eq!((equal[1].ppl, equal[1].ratio_text()), (32.0, "5.00×".into()));
        let equal = found.equal_flops();
        assert_eq!(equal.iter().map(|it| it.flops).collect::<Vec<_>>(), [6e9, 10e9]);
        assert!((equal[0].lower_percent - 100.0 * (1.0 - 28.0 / 36.0)).abs() < 1e-9);
        let status: Vec<&str> = found.requirements().iter().map(Requirement::status).collect();
        assert_eq!(status, ["FAIL", "FAIL"], "nobody measured what Mamba needs for 30");
        let reached =
            points(&[("mamba", 4e9, 30.0), ("mamba", 2e9, 90.0), ("resnetbk", 2e9, 30.0), ("resnetbk", 4e9, 20.0)]);
        let status: Vec<&str> = reached.requirements().iter().map(Requirement::status).collect();
        assert_eq!((status, reached.requirements()[0].value), (vec!["PASS", "PASS"], Measured::Finite(2.0)));
        assert!(
            (reached.requirements()[1].value.finite().unwrap() - 100.0 / 3.0).abs() < 1e-9,
            "within 4, not 2 GFLOPs"
        );
        assert_eq!(points(&[("llama", 1e6, 50.0)]).requirements()[0].status(), "MISSING");
        let worse = points(&[("resnetbk", 1e6, 94.0), ("mamba", 2e6, 46.0)]);
        assert_eq!(worse.requirements()[0].status(), "FAIL", "ResNet-BK does not reach 30");
        let larger = points(&[("resnetbk", 3e6, 9.0), ("mamba", 2e6, 46.0)]);
        assert_eq!(larger.requirements()[1].status(), "FAIL", "ResNet-BK has nothing within Mamba's FLOPs");
    }
}
