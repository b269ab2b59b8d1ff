//! Every kernel of the GPU against the scalar oracle, on the emulator: all encodings, ragged shapes.
//!
//! Inputs are fresh random numbers; a failure names the seed, and `BKPACK_TEST_SEED` replays it.

#[expect(dead_code, reason = "what compares instruction sets is not needed here")]
mod common;
mod emulator;
#[path = "cuda/mixture.rs"]
mod mixture;
#[path = "cuda/operations.rs"]
mod operations;
#[path = "cuda/steps.rs"]
mod steps;

use bkpack_kernels::{
    FloatType,
    cuda::{Cuda, DeviceValues},
};
use half::{bf16, f16};

emulator::on_the_emulator!(
    operations::products,
    operations::rows_of_matrices,
    operations::element_by_element,
    operations::norms,
    operations::moving_values,
    operations::a_token_that_is_added_to_twice,
    operations::attention,
    operations::wide_heads,
    operations::convolution,
    operations::scan,
    operations::resolvent,
    mixture::routing,
    mixture::layers_of_chosen_experts,
    mixture::one_expert_and_parts_of_a_stack,
    mixture::choices_beyond_the_experts,
    mixture::weighted_sums,
    mixture::a_recorded_step_chooses_anew,
    steps::steps,
    steps::a_carried_value_goes_on,
    steps::what_a_recording_uses_is_kept,
    steps::a_step_that_waits_is_not_recorded,
    steps::a_replay_beyond_the_room,
    steps::caches_that_fell_behind,
    steps::memory_that_waits_is_given_back with ("BKPACK_EMULATOR_MEMORY", "1000000"),
    steps::another_context_on_the_thread,
);

fn cuda() -> Cuda {
    let cuda = Cuda::open().unwrap();
    println!("on {}", cuda.card().name);
    cuda
}

fn read(cuda: &Cuda, x: &DeviceValues) -> Vec<f32> {
    let mut out = Vec::new();
    cuda.read(x, &mut out).unwrap();
    assert_eq!(out.len(), x.rows() * x.cols());
    out
}

fn float_bytes(dtype: FloatType, values: &[f32]) -> Vec<u8> {
    let bytes = |v: &f32| match dtype {
        FloatType::F32 => v.to_le_bytes().to_vec(),
        FloatType::F16 => f16::from_f32(*v).to_le_bytes().to_vec(),
        FloatType::BF16 => bf16::from_f32(*v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

#[test]
fn wide_heads_where_blocks_have_little_shared_memory() {
    emulator::run("operations::wide_heads", &[("BKPACK_EMULATOR_SHARED", "101376")]);
}

#[test]
fn steps_run_one_by_one_where_the_driver_records_nothing() {
    emulator::run("steps::steps", &[("BKPACK_EMULATOR_CAPTURE", "0")]);
}
