//! The selective scan, differentiated by running its recurrence backward: states are computed again, a channel at a
//! time, so that memory grows with the tokens and not with the states of all of them.

use candle_core::WithDType;
use rayon::prelude::*;

use super::function::Function;

/// Channels of one task, whose sums are added in order, so that they do not depend on the number of threads.
const TASK: usize = 32;

/// `h = exp(delta * a) * h + delta * b * x`, `y = c * h`, from x, delta, b and c side by side,
/// `[tokens, 2 * (channels + states)]`, `a` and the first `h`, `[channels, states]` each, to `y` and the last `h` one
/// after the other, `[tokens * channels + channels * states]`.
pub(super) struct StateScan {
    pub tokens: usize,
    pub channels: usize,
    pub states: usize,
}

/// What a token brings to one channel.
struct Step<'a, T> {
    x: f64,
    delta: f64,
    b: &'a [T], // [states]
    c: &'a [T], // [states]
}

/// The gradients that a task of a few channels finds.
struct TaskGradients {
    x: Vec<f64>,     // [channels of the task, tokens]
    delta: Vec<f64>, // [channels of the task, tokens]
    b: Vec<f64>,     // [tokens, states]
    c: Vec<f64>,     // [tokens, states]
    a: Vec<f64>,     // [channels of the task, states]
    first: Vec<f64>, // [channels of the task, states]
}

impl StateScan {
    fn width(&self) -> usize {
        2 * (self.channels + self.states)
    }

    fn step<'a, T: WithDType>(&self, inputs: &'a [T], token: usize, channel: usize) -> Step<'a, T> {
        let row = &inputs[token * self.width()..][..self.width()];
        let (b, c) = row[2 * self.channels..].split_at(self.states);
        Step { x: row[channel].to_f64(), delta: row[self.channels + channel].to_f64(), b, c }
    }

    fn row<T: WithDType>(&self, values: &[T], channel: usize) -> Vec<f64> {
        values[channel * self.states..][..self.states].iter().map(|value| value.to_f64()).collect()
    }

    /// The states before the first token and after each one, `[tokens + 1, states]`.
    fn run<T: WithDType>(&self, [inputs, a, first]: [&[T]; 3], channel: usize) -> Vec<f64> {
        let a = self.row(a, channel);
        let mut all = self.row(first, channel);
        all.reserve(self.tokens * self.states);
        for token in 0..self.tokens {
            let Step { x, delta, b, .. } = self.step(inputs, token, channel);
            for state in 0..self.states {
                let before = all[token * self.states + state];
                all.push((delta * a[state]).exp() * before + delta * b[state].to_f64() * x);
            }
        }
        all
    }

    /// `of_y` is `[tokens, channels]`, `of_last` `[channels, states]`.
    fn task<T: WithDType>(
        &self,
        inputs: [&[T]; 3],
        (of_y, of_last): (&[T], &[T]),
        channels: std::ops::Range<usize>,
    ) -> TaskGradients {
        let (tokens, states) = (self.tokens, self.states);
        let zeros = |rows: usize, cols: usize| vec![0.0; rows * cols];
        let mut gradients = TaskGradients {
            x: zeros(channels.len(), tokens),
            delta: zeros(channels.len(), tokens),
            b: zeros(tokens, states),
            c: zeros(tokens, states),
            a: zeros(channels.len(), states),
            first: zeros(channels.len(), states),
        };
        for (index, channel) in channels.enumerate() {
            let all = self.run(inputs, channel);
            let a = self.row(inputs[1], channel);
            let mut of_state = self.row(of_last, channel);
            let of_a = &mut gradients.a[index * states..][..states];
            for token in (0..tokens).rev() {
                let Step { x, delta, b, c } = self.step(inputs[0], token, channel);
                let of_y = of_y[token * self.channels + channel].to_f64();
                let (before, after) = all[token * states..][..2 * states].split_at(states);
                let of_b = &mut gradients.b[token * states..][..states];
                let of_c = &mut gradients.c[token * states..][..states];
                let (mut of_x, mut of_delta) = (0.0, 0.0);
                for state in 0..states {
                    let b = b[state].to_f64();
                    let decay = (delta * a[state]).exp();
                    let gradient = of_state[state] + of_y * c[state].to_f64();
                    of_c[state] += of_y * after[state];
                    of_b[state] += gradient * delta * x;
                    of_x += gradient * delta * b;
                    of_delta += gradient * (before[state] * decay * a[state] + b * x);
                    of_a[state] += gradient * before[state] * decay * delta;
                    of_state[state] = gradient * decay;
                }
                gradients.x[index * tokens + token] = of_x;
                gradients.delta[index * tokens + token] = of_delta;
            }
            gradients.first[index * states..][..states].copy_from_slice(&of_state);
        }
        gradients
    }
}

impl Function<3> for StateScan {
    const NAME: &str = "selective scan";

    fn shape(&self, _: [&[usize]; 3]) -> Vec<usize> {
        vec![(self.tokens + self.states) * self.channels]
    }

    fn forward<T: WithDType>(&self, inputs: [&[T]; 3]) -> Vec<T> {
        let of_channel = |channel: usize| {
            let all = self.run(inputs, channel);
            let read = |token: usize| {
                let state = &all[(token + 1) * self.states..][..self.states];
                let Step { c, .. } = self.step(inputs[0], token, channel);
                state.iter().zip(c).map(|(state, c)| state * c.to_f64()).sum::<f64>()
            };
            let outputs: Vec<f64> = (0..self.tokens).map(read).collect();
            (outputs, all[self.tokens * self.states..].to_vec())
        };
        let channels: Vec<(Vec<f64>, Vec<f64>)> = (0..self.channels).into_par_iter().map(of_channel).collect();
        let outputs = (0..self.tokens).flat_map(|token| channels.iter().map(move |(outputs, _)| outputs[token]));
        outputs.chain(channels.iter().flat_map(|(_, last)| last.iter().copied())).map(T::from_f64).collect()
    }

    fn backward<T: WithDType>(&self, inputs: [&[T]; 3], _: &[T], gradient: &[T]) -> [Vec<T>; 3] {
        let gradient = gradient.split_at(self.tokens * self.channels);
        let ranges = (0..self.channels).step_by(TASK).map(|first| first..(first + TASK).min(self.channels));
        let ranges: Vec<_> = ranges.collect();
        let tasks: Vec<TaskGradients> =
            ranges.into_par_iter().map(|channels| self.task(inputs, gradient, channels)).collect();

        let mut of_inputs = Vec::with_capacity(self.tokens * self.width());
        for token in 0..self.tokens {
            let column =
                |values: &'_ Vec<f64>| values.iter().skip(token).step_by(self.tokens).copied().collect::<Vec<_>>();
            let sums = |of: fn(&TaskGradients) -> &Vec<f64>| {
                let range = token * self.states..(token + 1) * self.states;
                range.map(|index| tasks.iter().map(|task| of(task)[index]).sum::<f64>()).collect::<Vec<_>>()
            };
            of_inputs.extend(tasks.iter().flat_map(|task| column(&task.x)));
            of_inputs.extend(tasks.iter().flat_map(|task| column(&task.delta)));
            of_inputs.extend(sums(|task| &task.b));
            of_inputs.extend(sums(|task| &task.c));
        }
        let joined =
            |of: fn(&TaskGradients) -> &Vec<f64>| tasks.iter().flat_map(of).map(|&value| T::from_f64(value)).collect();
        let of_inputs = of_inputs.into_iter().map(T::from_f64).collect();
        [of_inputs, joined(|task| &task.a), joined(|task| &task.first)]
    }
}
