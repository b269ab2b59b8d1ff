//! Recorded steps, memory that is used again, and other users of the card.

use bkpack_kernels::{
    Data, FloatType, Matrix,
    cuda::{Cuda, CudaError, DeviceMatrix, DeviceValues, StepGraph},
};

use super::{cuda, float_bytes, read};

/// The same numbers whether a step is run, recorded or replayed; the position and the token come from the card.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn steps() {
    let cuda = cuda();
    let values: Vec<f32> = (0..60).map(|value| value as f32).collect();
    let table = floats(&cuda, 10, 6, &values);
    let positions = cuda.values(&values, 6).unwrap();
    let (mut graph, mut out, mut runs) = (StepGraph::default(), Vec::new(), 0);
    for (position, token) in [7, 3, 9, 0, 2].into_iter().enumerate() {
        let run = || {
            runs += 1;
            let sum = cuda.add(cuda.embed_step(&table)?, &cuda.row_at_step(&positions)?)?;
            cuda.add(sum, &cuda.embed_at_step(&table)?)
        };
        cuda.step::<CudaError>(&mut graph, (token, position), run, &mut out).unwrap();
        let expected: Vec<f32> =
            (0..6).map(|i| values[token as usize * 6 + i] + 2.0 * values[position * 6 + i]).collect();
        assert_eq!(out, expected, "step {position}");
        // What other work takes in between are not the buffers of the recording.
        let other = cuda.values(&[1e9; 6], 6).unwrap();
        assert_eq!(read(&cuda, &other), [1e9; 6]);
    }
    // Run, recorded, and then replayed; never recorded where the driver refuses.
    let refused = std::env::var("BKPACK_EMULATOR_CAPTURE").is_ok_and(|value| value == "0");
    assert_eq!((runs, graph.is_recorded()), if refused { (5, false) } else { (2, true) });
}

fn floats(cuda: &Cuda, rows: usize, cols: usize, values: &[f32]) -> DeviceMatrix {
    let values = float_bytes(FloatType::F32, values);
    let matrix = Matrix::new(rows, cols, Data::Float { dtype: FloatType::F32, values: &values }).unwrap();
    cuda.matrix(&matrix).unwrap()
}

/// A recording replays on what it was made with, whatever its owners have dropped since.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn what_a_recording_uses_is_kept() {
    let cuda = cuda();
    let (mut graph, mut out) = (StepGraph::default(), Vec::new());
    let expected = |token: u32, position: usize| vec![(token * 100) as f32 + position as f32 * 10.0 + 1.0; 4];
    {
        let table = floats(&cuda, 3, 4, &[[0.0; 4], [100.0; 4], [200.0; 4]].concat());
        let positions = cuda.values(&[[0.0; 4], [10.0; 4], [20.0; 4], [30.0; 4]].concat(), 4).unwrap();
        let one = cuda.values(&[1.0; 8], 4).unwrap();
        for (position, token) in [2, 1].into_iter().enumerate() {
            let run = || {
                let sum = cuda.add(cuda.embed_step(&table)?, &cuda.row_at_step(&positions)?)?;
                cuda.add(sum, &cuda.rows(&one, 1, 1)?)
            };
            cuda.step::<CudaError>(&mut graph, (token, position), run, &mut out).unwrap();
            assert_eq!(out, expected(token, position));
        }
    }
    assert!(graph.is_recorded());
    // These would lie where the operands did.
    let _others: Vec<DeviceValues> = (0..8).map(|_| cuda.values(&[1e9; 16], 4).unwrap()).collect();
    let gone = || -> Result<DeviceValues, CudaError> { unreachable!("a replay runs nothing anew") };
    for (position, token) in [(2, 1), (3, 0)] {
        cuda.step(&mut graph, (token, position), gone, &mut out).unwrap();
        assert_eq!(out, expected(token, position));
    }
}

/// The resolvent's value goes from step to step on the card, and from what ran before; cleared, it starts again.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn a_carried_value_goes_on() {
    let (cuda, z) = (cuda(), [0.25, 1.0]);
    let potentials: Vec<f32> = (0..8).map(|i| (i as f32 * 0.7).sin()).collect();
    let whole = cuda.causal_resolvent(&cuda.values(&potentials, 1).unwrap(), z, &mut cuda.carry().unwrap()).unwrap();
    let expected = read(&cuda, &whole);
    let table = cuda.values(&potentials, 1).unwrap();
    let (mut graph, mut out, mut runs) = (StepGraph::default(), Vec::new(), 0);
    let mut carry = cuda.carry().unwrap();
    for first in [3, 1, 0] {
        cuda.clear_carry(&mut carry).unwrap();
        if first > 0 {
            cuda.causal_resolvent(&cuda.rows(&table, 0, first).unwrap(), z, &mut carry).unwrap();
        }
        for position in first..8 {
            let run = || {
                runs += 1;
                cuda.causal_resolvent(&cuda.row_at_step(&table)?, z, &mut carry)
            };
            cuda.step::<CudaError>(&mut graph, (0, position), run, &mut out).unwrap();
            let difference =
                out.iter().zip(&expected[2 * position..]).map(|(found, expected)| (found - expected).abs());
            assert!(difference.fold(0.0, f32::max) < 1e-6, "position {position} of a text from {first}");
        }
    }
    assert_eq!((runs, graph.is_recorded()), (2, true));
}

/// What gives memory back waits for all work, which ends a recording.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn a_step_that_waits_is_not_recorded() {
    let cuda = cuda();
    let positions = cuda.values(&[0.0, 1.0, 2.0, 3.0], 1).unwrap();
    let (mut graph, mut out) = (StepGraph::default(), Vec::new());
    for position in 0..4 {
        let mut spare = Some(floats(&cuda, 1, 1, &[1.0]));
        let run = || {
            let found = cuda.row_at_step(&positions)?;
            spare.take();
            cuda.add(found, &cuda.row_at_step(&positions)?)
        };
        cuda.step::<CudaError>(&mut graph, (0, position), run, &mut out).unwrap();
        assert_eq!((&out[..], graph.is_recorded()), (&[2.0 * position as f32][..], false));
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
#[should_panic(expected = "has room for 3 positions")]
fn a_replay_beyond_the_room() {
    let cuda = cuda();
    let positions = cuda.values(&[0.0, 1.0, 2.0], 1).unwrap();
    let (mut graph, mut out) = (StepGraph::default(), Vec::new());
    for position in 0..4 {
        let run = || cuda.row_at_step(&positions);
        cuda.step::<CudaError>(&mut graph, (0, position), run, &mut out).unwrap();
        assert_eq!(out, [position as f32]);
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
#[should_panic(expected = "caches of 2 positions")]
fn caches_that_fell_behind() {
    let cuda = cuda();
    let x = cuda.values(&[1.0; 4], 4).unwrap();
    let mut cache = cuda.cache(1, 4, 8).unwrap();
    let (mut graph, mut out) = (StepGraph::default(), Vec::new());
    for position in 0..3 {
        if position == 2 {
            cache.clear();
        }
        let run = || cuda.attention(&x, &x, &x, &mut cache, 1, 0.5, usize::MAX);
        cuda.step::<CudaError>(&mut graph, (0, position), run, &mut out).unwrap();
    }
}

/// What the program has dropped makes room for what is not of its size, wherever that is taken from.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn memory_that_waits_is_given_back() {
    let cuda = cuda();
    let third = (cuda.free_memory().unwrap() / 3) as usize & !0xffff;
    let drop_two_thirds = || drop(cuda.zeros(2 * third / 4, 1).unwrap());
    drop_two_thirds();
    let bytes = vec![0; third / 2 * 3];
    let values = Data::Float { dtype: FloatType::F32, values: &bytes };
    drop(cuda.matrix(&Matrix::new(bytes.len() / 4, 1, values).unwrap()).unwrap());

    // A step takes its buffers from elsewhere.
    drop_two_thirds();
    let (mut graph, mut out) = (StepGraph::default(), Vec::new());
    let run = || cuda.rows(&cuda.zeros(third / 8 * 3, 1)?, 0, 1);
    cuda.step::<CudaError>(&mut graph, (0, 0), run, &mut out).unwrap();
    assert_eq!(out, [0.0]);
    drop(graph);

    drop_two_thirds();
    cuda.check_room(2 * third as u64).unwrap();
    drop_two_thirds();
    assert!(matches!(cuda.zeros(third, 1), Err(CudaError::OutOfMemory { .. })));
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn another_context_on_the_thread() {
    let cuda = cuda();
    let leave = || {
        // SAFETY: no context is current after this, which is what any other part of a program may cause.
        unsafe { cudarc::driver::result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    };
    leave();
    let x = cuda.values(&[1.0, 2.0], 2).unwrap();
    leave();
    let y = cuda.zeros(1, 2).unwrap();
    leave();
    let sum = cuda.add(y, &x).unwrap();
    leave();
    let copy = cuda.rows(&sum, 0, 1).unwrap();
    leave();
    assert_eq!(read(&cuda, &copy), [1.0, 2.0]);
    leave();
    cuda.check_room(1).unwrap();
    leave();
}
