//! The heat map of a packed model's tensors.

use bkpack::report::{
    figure::Format,
    tensors::{self, Stored},
};

use crate::{keep, svg::Drawing};

fn stored(name: String, encoding: &str, bits: f64, bytes: u64) -> Stored {
    Stored { name, encoding: encoding.into(), bits, bytes }
}

#[test]
fn tensors_are_a_cell_for_each_layer_and_kind() {
    let mut found = vec![stored("model.embed_tokens.weight".into(), "FP16", 16.0, 98_304_000)];
    for layer in 0..32 {
        for (index, kind) in ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().enumerate() {
            let (encoding, bits) = [("INT8 g128", 8.0), ("INT4 g128", 4.0), ("INT3 g64", 3.0)][(layer + index) % 3];
            found.push(stored(format!("model.layers.{layer}.self_attn.{kind}.weight"), encoding, bits, 8_912_896));
        }
        for expert in 0..8 {
            let (encoding, bits) = if layer == 3 && expert > 4 { ("INT8 g128", 8.0) } else { ("INT2 g64", 2.0) };
            found.push(stored(format!("model.layers.{layer}.mlp.experts.{expert}.w1.weight"), encoding, bits, 123_456));
        }
        found.push(stored(format!("model.layers.{layer}.input_layernorm.weight"), "FP32", 32.0, 16_384));
    }
    found.push(stored("lm_head.weight".into(), "FP16", 16.0, 98_304_000));
    let figure = tensors::draw("Encodings of the tensors", "test-model, 46,702,848 parameters", &found);
    keep(&figure, "tensors");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    // Experts share a cell; it is grey where their encodings differ.
    let cells = drawing.colors("cells", "rect");
    assert_eq!((cells.len(), drawing.count("outside", "rect")), (32 * 6, 2));
    assert_eq!(cells.iter().filter(|color| **color == "#8c8c8c").count(), 1);
    let kinds = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.experts.*.w1",
        "input_layernorm",
    ];
    assert_eq!(drawing.texts_of("kinds"), kinds);
    assert!(drawing.texts_of("legend").iter().any(|text| text == "INT2 g64 (253 tensors, 31.2 MB)"));
}

#[test]
fn tensors_are_tidy_whatever_their_names() {
    let odd = |name: &str| stored(name.into(), "INT4 g128", 4.0, 999_499_999_999_999);
    let long = format!("a.{}.0.{}", "b".repeat(500), "c".repeat(500));
    for names in
        [vec![], vec!["weight"], vec!["a.0.b", "z.0.b", "a.18446744073709551615.b", long.as_str(), "\u{7f}.1.\n"]]
    {
        let tensors: Vec<Stored> = names.iter().map(|name| odd(name)).collect();
        Drawing::of(&tensors::draw("Encodings", &long, &tensors)).assert_tidy();
    }
}

#[test]
fn tensors_of_a_huge_grid_are_cut_and_pixels_bounded() {
    let cell =
        |index: usize| stored(format!("model.layers.{}.kind{}.weight", index / 300, index % 300), "INT4", 4.0, 1);
    let mut tensors: Vec<Stored> = (0..300 * 300).map(cell).collect();
    tensors.extend((0..100).map(|index| stored(format!("outside{index}"), "INT4", 4.0, 1)));
    let figure = tensors::draw("Encodings", "of a test", &tensors);
    let drawing = Drawing::of(&figure);
    let [layers, kinds, outside] = tensors::MOST;
    assert_eq!((drawing.count("cells", "rect"), drawing.count("outside", "rect")), (layers * kinds, outside));
    assert_eq!(
        drawing.texts_of("left-out"),
        ["… not shown, but in sums and legend: 44 more layers, 236 more kinds, 36 more tensors outside …"]
    );
    assert_eq!(drawing.texts_of("sums")[0], "300 B", "of a whole column");
    let error = figure.render(Format::Png, 1200).unwrap_err().to_string();
    assert!(error.contains("pixels are too many; lower --dpi"), "{error}");
}
