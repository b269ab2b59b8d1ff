//! What a CPU is, and what the kernels make of it, for people.

use super::Isa;

/// What the kernels of one instruction set run on, by operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Products of f32 activations with weights.
    pub f32_products: &'static str,
    /// Products of activations rounded to INT8 with packed codes.
    pub int8_products: &'static str,
    /// Codes out of the dense bitstream.
    pub unpacking: &'static str,
}

impl Isa {
    /// The instructions that carry the work.
    pub const fn describe(self) -> Description {
        match self {
            Isa::Scalar => Description {
                f32_products: "one multiply-add at a time",
                int8_products: "one product at a time",
                unpacking: "shifts of 64-bit words",
            },
            Isa::Avx2 => Description {
                f32_products: "vfmadd, 256 bits",
                int8_products: "vpmaddubsw and vpmaddwd, 256 bits",
                unpacking: "vpshufb and vpmullw",
            },
            Isa::Avx512 => Description {
                f32_products: "vfmadd, 512 bits",
                int8_products: "vpdpbusd (VNNI), 512 bits",
                unpacking: "vpermb and vpmultishiftqb (VBMI)",
            },
            Isa::Amx => Description {
                f32_products: "vfmadd, 512 bits",
                int8_products: "AMX tiles from 8 tokens and groups of 29 on, vpdpbusd (VNNI) below",
                unpacking: "vpermb and vpmultishiftqb (VBMI)",
            },
        }
    }
}

/// The name that the CPU gives itself; the architecture's where it has none.
pub fn name() -> String {
    let name = brand();
    let name = name.split_whitespace().collect::<Vec<_>>().join(" ");
    if name.is_empty() { std::env::consts::ARCH.to_owned() } else { name }
}

/// The brand string of leaves 0x80000002 to 0x80000004.
#[cfg(target_arch = "x86_64")]
fn brand() -> String {
    use std::arch::x86_64::__cpuid;
    const FIRST: u32 = 0x8000_0002;
    if __cpuid(0x8000_0000).eax < FIRST + 2 {
        return String::new();
    }
    let leaves = (FIRST..FIRST + 3).map(__cpuid);
    let bytes: Vec<u8> =
        leaves.flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]).flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(not(target_arch = "x86_64"))]
fn brand() -> String {
    String::new()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_cpu_has_a_name_of_one_line() {
        let name = super::name();
        assert!(!name.is_empty() && !name.contains(['\0', '\n']) && name.trim() == name, "{name:?}");
    }
}
