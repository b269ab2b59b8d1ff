//! Choosing one option for every item so that the costs are least and the bytes within a budget: a multiple-choice
//! knapsack. Pure functions of numbers.
//!
//! The upgrades on the lower convex hull of each item's options, taken by cost saved for a byte, are the Lagrangian
//! solution: optimal but for what the last step leaves of the budget. Its multiplier bounds every choice from below, so a
//! dynamic program has little left to look through. It is exact as long as its states are few enough to keep them all.

use std::cmp::Ordering;

use bkpack_kernels::{FloatType, Grid};

use crate::encoding::{GroupSize, Request};

/// States of the dynamic program that are kept for each item, those closest to the bound.
const MOST_STATES: usize = 1024;

/// One option of an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub bytes: u64,
    /// The lower, the better.
    pub cost: f64,
}

/// The encodings that a matrix with rows of this many columns can have: 2 to 8 bits in groups of 32 to 256 and of a row,
/// with and without zero points, FP16 and BF16. Groups that a row does not fill are left out: they are the row's.
pub fn candidates(cols: usize) -> Vec<Request> {
    let columns = [32, 64, 128, 256].into_iter().filter(|&columns| (columns as usize) < cols).map(GroupSize::Columns);
    let groups: Vec<GroupSize> = columns.chain([GroupSize::WholeRow]).collect();
    let mut requests = Vec::new();
    for bits in 2..=8 {
        for &group in &groups {
            for symmetric in [true, false] {
                requests.push(Request::Quantize { grid: Grid::Int { bits, symmetric }, group });
            }
        }
    }
    requests.extend([FloatType::F16, FloatType::BF16].map(Request::Float));
    requests
}

/// The option of each item with the fewest bytes; of those with as many, the one that costs least.
pub fn smallest(items: &[Vec<Candidate>]) -> Vec<usize> {
    items.iter().map(|options| frontier(options)[0]).collect()
}

/// Picks an option of every item: the costs together as low as can be found, the bytes together within the budget.
/// Returns their indices; `None` if not even the smallest options fit. The same items give the same answer.
///
/// # Panics
/// If an item has no options, or a cost is NaN: the caller's mistake.
pub fn solve(items: &[Vec<Candidate>], budget: u64) -> Option<Vec<usize>> {
    let frontiers: Vec<Vec<usize>> = items.iter().map(|options| frontier(options)).collect();
    let mut chosen: Vec<usize> = frontiers.iter().map(|frontier| frontier[0]).collect();
    let left = budget.checked_sub(total_bytes(items, &chosen))?;
    if let Some(price) = climb(items, &frontiers, &mut chosen, left) {
        improve(items, &frontiers, budget, price, &mut chosen);
    }
    Some(chosen)
}

/// The bytes of a choice.
pub fn total_bytes(items: &[Vec<Candidate>], chosen: &[usize]) -> u64 {
    items.iter().zip(chosen).map(|(options, &index)| options[index].bytes).sum()
}

/// The cost of a choice.
pub fn total_cost(items: &[Vec<Candidate>], chosen: &[usize]) -> f64 {
    items.iter().zip(chosen).map(|(options, &index)| options[index].cost).sum()
}

/// The options that no smaller one equals in cost: by rising bytes and falling cost.
fn frontier(options: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..options.len()).collect();
    order.sort_by(|&a, &b| options[a].bytes.cmp(&options[b].bytes).then(compare(options[a].cost, options[b].cost)));
    let mut frontier: Vec<usize> = Vec::new();
    for index in order {
        if frontier.last().is_none_or(|&last| options[index].cost < options[last].cost) {
            frontier.push(index);
        }
    }
    frontier
}

/// Cost saved for a byte on the way from one option to a larger one.
fn slope(from: Candidate, to: Candidate) -> f64 {
    (from.cost - to.cost) / (to.bytes - from.bytes) as f64
}

/// The lower convex hull of a frontier: each step saves less for a byte than the one before.
fn hull(options: &[Candidate], frontier: &[usize]) -> Vec<usize> {
    let mut hull: Vec<usize> = Vec::new();
    for &next in frontier {
        while let [.., before, last] = hull[..]
            && slope(options[before], options[last]) <= slope(options[last], options[next])
        {
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

/// Takes the hulls' steps, those that save most for a byte first, as far as the bytes that are left go. Returns what the
/// first step that was too large saves for a byte; `None` if there was none, and the choice is the best.
fn climb(items: &[Vec<Candidate>], frontiers: &[Vec<usize>], chosen: &mut [usize], mut left: u64) -> Option<f64> {
    let mut steps: Vec<(f64, usize, usize, usize)> = Vec::new();
    for (item, (options, frontier)) in items.iter().zip(frontiers).enumerate() {
        for pair in hull(options, frontier).windows(2) {
            steps.push((slope(options[pair[0]], options[pair[1]]), item, pair[0], pair[1]));
        }
    }
    steps.sort_by(|a, b| compare(b.0, a.0));
    let mut price = None;
    for (saving, item, from, to) in steps {
        let bytes = items[item][to].bytes - items[item][from].bytes;
        // A step that is not taken leaves the item where it is: the later ones do not start there.
        if chosen[item] == from && bytes <= left {
            chosen[item] = to;
            left -= bytes;
        } else if price.is_none() {
            price = Some(saving);
        }
    }
    price
}

/// A choice for the first items, as far as it matters for the rest.
#[derive(Clone, Copy, Debug)]
struct State {
    bytes: u64,
    cost: f64,
    /// How far it is from the bound so far.
    excess: f64,
    /// Its place among the states of one item fewer, and what was chosen for the item.
    parent: u32,
    option: u32,
}

/// Looks for a better choice than one that is known, by dynamic programming over the items. `price` is what a byte is
/// worth at the budget: no choice costs less than `bound`, the sum of the least `cost + price * bytes` of each item less
/// the price of the budget, and each option has an excess over its item's least. Options and states whose excess is more
/// than the known choice's are left out, and so are states that another one beats in both bytes and cost.
fn improve(items: &[Vec<Candidate>], frontiers: &[Vec<usize>], budget: u64, price: f64, chosen: &mut [usize]) {
    let priced = |option: Candidate| option.cost + price * option.bytes as f64;
    let least: Vec<f64> = items
        .iter()
        .zip(frontiers)
        .map(|(options, frontier)| frontier.iter().map(|&index| priced(options[index])).fold(f64::INFINITY, f64::min))
        .collect();
    let known = total_cost(items, chosen);
    let slack = known - (least.iter().sum::<f64>() - price * budget as f64);
    // Bytes that the items still to come need at least.
    let mut needed: u64 = items.iter().zip(frontiers).map(|(options, frontier)| options[frontier[0]].bytes).sum();
    let mut levels: Vec<Vec<State>> = vec![vec![State { bytes: 0, cost: 0.0, excess: 0.0, parent: 0, option: 0 }]];
    for ((options, frontier), least) in items.iter().zip(frontiers).zip(&least) {
        needed -= options[frontier[0]].bytes;
        let before = levels.last().expect("there is a first level");
        let mut states = Vec::new();
        for &index in frontier {
            let (option, excess) = (options[index], priced(options[index]) - least);
            states.extend(before.iter().enumerate().filter_map(|(parent, state)| {
                let next = State {
                    bytes: state.bytes + option.bytes,
                    cost: state.cost + option.cost,
                    excess: state.excess + excess,
                    parent: parent as u32,
                    option: index as u32,
                };
                (next.excess <= slack && next.bytes + needed <= budget).then_some(next)
            }));
        }
        if states.len() > MOST_STATES {
            states.select_nth_unstable_by(MOST_STATES, |a, b| compare(a.excess, b.excess).then(a.bytes.cmp(&b.bytes)));
            states.truncate(MOST_STATES);
        }
        states.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(compare(a.cost, b.cost)));
        let mut cheapest = f64::INFINITY;
        states.retain(|state| {
            state.cost < cheapest && {
                cheapest = state.cost;
                true
            }
        });
        levels.push(states);
    }
    // By rising bytes and falling cost: the last one costs least.
    let Some(mut state) = levels.pop().and_then(|states| states.last().copied()) else { return };
    if state.cost >= known {
        return;
    }
    for (item, states) in levels.iter().enumerate().rev() {
        chosen[item] = state.option as usize;
        state = states[state.parent as usize];
    }
}

/// Compares costs, which are never NaN.
fn compare(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).expect("no NaN")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least cost within the budget, by trying everything.
    fn brute_force(items: &[Vec<Candidate>], budget: u64) -> Option<f64> {
        let Some((options, rest)) = items.split_first() else { return Some(0.0) };
        let costs = options
            .iter()
            .filter_map(|option| Some(option.cost + brute_force(rest, budget.checked_sub(option.bytes)?)?));
        costs.min_by(f64::total_cmp)
    }

    fn options(most: usize) -> impl Strategy<Value = Vec<Candidate>> {
        let option = (1u64..200, 0.0..10.0f64).prop_map(|(bytes, cost)| Candidate { bytes, cost });
        prop::collection::vec(option, 1..most)
    }

    /// Items as they come from encodings: each step up in width divides the cost by about four.
    fn encodings(count: usize) -> Vec<Vec<Candidate>> {
        let mut state = 7u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 31) as f64
        };
        let item = |_| {
            let weights = (1.0 + 30.0 * random()) * 65536.0;
            let sensitivity = (4.0 * random()).exp();
            let option = |index: usize| {
                let bits = 2.0 + (index / 5) as f64 + 0.05 * (index % 5) as f64;
                let cost = sensitivity * weights * (-1.386 * bits).exp() * (0.8 + 0.4 * random());
                Candidate { bytes: (weights * bits / 8.0) as u64, cost }
            };
            (0..40).map(option).collect()
        };
        (0..count).map(item).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn never_above_the_budget_and_the_best_of_all(
            items in prop::collection::vec(options(6), 1..6),
            share in 0.0..1.2f64,
        ) {
            let sizes = |options: &Vec<Candidate>| options.iter().map(|option| option.bytes).collect::<Vec<_>>();
            let floor: u64 = items.iter().map(|options| sizes(options).into_iter().min().unwrap()).sum();
            let most: u64 = items.iter().map(|options| sizes(options).into_iter().max().unwrap()).sum();
            let budget = floor + ((most - floor) as f64 * share) as u64;
            let chosen = solve(&items, budget).unwrap();
            prop_assert!(total_bytes(&items, &chosen) <= budget);
            let (found, best) = (total_cost(&items, &chosen), brute_force(&items, budget).unwrap());
            // Few enough to be exact; only rounding can part them.
            prop_assert!((found - best).abs() <= 1e-9, "{found} {best}");
            prop_assert!(floor == 0 || solve(&items, floor - 1).is_none());
            prop_assert_eq!(total_bytes(&items, &smallest(&items)), floor);
        }
    }

    #[test]
    fn many_tensors_take_no_time_and_use_the_budget() {
        let items = encodings(210);
        let floor = total_bytes(&items, &smallest(&items));
        for percent in [101, 110, 150, 200, 300] {
            let budget = floor * percent / 100;
            let start = std::time::Instant::now();
            let chosen = solve(&items, budget).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            let bytes = total_bytes(&items, &chosen);
            assert!(bytes <= budget && bytes as f64 > 0.9999 * budget as f64, "{bytes} of {budget}");
            // No choice can cost less than the bound; this one costs a thousandth more at most.
            let frontiers: Vec<Vec<usize>> = items.iter().map(|options| frontier(options)).collect();
            let price = climb(&items, &frontiers, &mut smallest(&items), budget - floor).unwrap();
            let least = |options: &Vec<Candidate>| {
                options.iter().map(|option| option.cost + price * option.bytes as f64).fold(f64::INFINITY, f64::min)
            };
            let bound = items.iter().map(least).sum::<f64>() - price * budget as f64;
            let cost = total_cost(&items, &chosen);
            assert!(cost >= bound * (1.0 - 1e-12) && cost <= bound * 1.001, "{cost}, no less than {bound}");
            // Hundredths of a second; the limit leaves room for a slow and busy machine and an unoptimized build.
            assert!(seconds < 10.0, "{seconds} s");
            assert_eq!(solve(&items, budget), Some(chosen));
        }
    }

    #[test]
    fn candidates_fit_the_row() {
        let text = |cols| candidates(cols).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(candidates(4096).len(), 7 * 5 * 2 + 2);
        assert_eq!(candidates(128).len(), 7 * 3 * 2 + 2);
        assert_eq!(candidates(32).len(), 7 * 2 + 2);
        assert!(text(128).contains(&"int3:g64:asym".to_owned()) && text(128).contains(&"bf16".to_owned()));
        assert!(!text(128).contains(&"int3:g128".to_owned()));
    }
}
