//! Weights that the next product reads: threads that wait for work ask memory for them meanwhile.
//!
//! Between two products of a decoded token one thread normalizes, rotates and adds, and memory would have nothing to do.
//! Which product follows is learned from the token before: a model runs its products in the same order every time. A wrong
//! guess costs some bandwidth; no result depends on it.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::matrix::{Data, Matrix};

/// Bytes that a thread asks for: a part of its second-level cache.
const MOST_BYTES: usize = 1 << 17;

/// Weights of a product that are remembered.
const MOST_WEIGHTS: usize = 4;

/// Products that are remembered.
const MOST_PRODUCTS: usize = 1 << 12;

/// Cache lines that are asked for between two looks for work.
const LINES: usize = 4;

/// The bytes of cache lines.
const LINE: usize = 64;

/// Where a weight's codes lie. Nothing is read through the address, which may be that of a model that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Piece {
    address: usize,
    bytes: usize,
}

/// A product's weights, one after the other.
type Product = [Piece; MOST_WEIGHTS];

/// The products of a token in their order.
#[derive(Debug, Default)]
struct Sequence {
    products: Vec<Product>,
    /// The place of the next product.
    next: usize,
}

impl Sequence {
    /// Takes note of a product, and gives the one that should follow.
    fn follow(&mut self, product: Product) -> Product {
        if self.products.get(self.next) != Some(&product) {
            // The last token's products end here, or another model's begin.
            self.products.truncate(self.next);
            if self.products.first() == Some(&product) {
                self.next = 0;
            } else {
                if self.products.len() == MOST_PRODUCTS {
                    self.products.clear();
                }
                self.next = self.products.len();
                self.products.push(product);
            }
        }
        self.next += 1;
        self.products.get(self.next).or(self.products.first()).copied().unwrap_or_default()
    }
}

thread_local! {
    /// Of the products that this thread runs.
    static SEQUENCE: RefCell<Sequence> = RefCell::default();
    /// What this thread has yet to ask for.
    static ASKED: Cell<Asked> = Cell::default();
}

/// What was announced last.
static AHEAD: Ahead = Ahead {
    number: AtomicUsize::new(0),
    shares: AtomicUsize::new(1),
    pieces: [const { [AtomicUsize::new(0), AtomicUsize::new(0)] }; MOST_WEIGHTS],
};

/// A product whose weights are read next. Its parts may be seen from two announcements at once, which only asks for the
/// wrong bytes.
struct Ahead {
    number: AtomicUsize,
    /// Threads that share the weights.
    shares: AtomicUsize,
    pieces: [[AtomicUsize; 2]; MOST_WEIGHTS],
}

/// What one thread has yet to ask for of an announced product.
#[derive(Clone, Copy, Default)]
struct Asked {
    number: usize,
    pieces: Product,
}

impl Asked {
    /// Where the next [`LINES`] start.
    fn next(&mut self) -> Option<usize> {
        let piece = self.pieces.iter_mut().find(|piece| piece.bytes > 0)?;
        let address = piece.address;
        piece.address = address.wrapping_add(LINE * LINES);
        piece.bytes = piece.bytes.saturating_sub(LINE * LINES);
        Some(address)
    }
}

/// Says that a product of `weights` starts now on `shares` threads, which have a share each, in order.
pub(super) fn announce(weights: &[Matrix], shares: usize) {
    let mut product = Product::default();
    for (piece, w) in product.iter_mut().zip(weights) {
        let codes = match w.data() {
            Data::Float { values, .. } => values,
            Data::Quantized { codes, .. } => codes,
        };
        *piece = Piece { address: codes.as_ptr().addr(), bytes: codes.len() };
    }
    let ahead = SEQUENCE.with_borrow_mut(|sequence| sequence.follow(product));
    for ([address, bytes], piece) in AHEAD.pieces.iter().zip(ahead) {
        address.store(piece.address, Ordering::Relaxed);
        bytes.store(piece.bytes, Ordering::Relaxed);
    }
    AHEAD.shares.store(shares, Ordering::Relaxed);
    AHEAD.number.fetch_add(1, Ordering::Release);
}

/// Asks memory for some lines of a share of what was announced; `false` if there are no more.
#[inline]
pub(super) fn ask(share: usize) -> bool {
    ASKED.with(|cell| {
        let mut asked = cell.get();
        let number = AHEAD.number.load(Ordering::Acquire);
        if asked.number != number {
            let pieces = AHEAD.pieces.each_ref().map(|[address, bytes]| Piece {
                address: address.load(Ordering::Relaxed),
                bytes: bytes.load(Ordering::Relaxed),
            });
            asked = Asked { number, pieces: of_share(pieces, share, AHEAD.shares.load(Ordering::Relaxed)) };
        }
        let lines = asked.next();
        cell.set(asked);
        if let Some(address) = lines {
            (0..LINES).for_each(|line| prefetch(address.wrapping_add(LINE * line)));
        }
        lines.is_some()
    })
}

/// What a share reads first, at most [`MOST_BYTES`].
fn of_share(product: Product, share: usize, shares: usize) -> Product {
    let total = product.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.bytes));
    let mut before = (total / shares.max(1)).saturating_mul(share);
    let mut rest = if share < shares { MOST_BYTES.min(total / shares) } else { 0 };
    product.map(|Piece { address, bytes }| {
        let skipped = before.min(bytes);
        let taken = rest.min(bytes - skipped);
        before -= skipped;
        rest -= taken;
        Piece { address: address.wrapping_add(skipped), bytes: taken }
    })
}

/// Asks for a cache line at the second level.
#[inline(always)]
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch is a hint, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(pieces: &[(usize, usize)]) -> Product {
        let mut product = Product::default();
        for (piece, &(address, bytes)) in product.iter_mut().zip(pieces) {
            *piece = Piece { address, bytes };
        }
        product
    }

    #[test]
    fn the_order_of_the_last_token_is_expected_again() {
        let [a, b, c, d] = [1, 2, 3, 4].map(|address| product(&[(address, 64)]));
        let mut sequence = Sequence::default();
        // While the first token runs, its first product is the best guess.
        assert_eq!([a, b, c].map(|product| sequence.follow(product)), [a; 3]);
        for _ in 0..3 {
            assert_eq!([a, b, c].map(|product| sequence.follow(product)), [b, c, a]);
        }
        // Another model's products replace what does not repeat.
        assert_eq!([a, d].map(|product| sequence.follow(product)), [b, a]);
        assert_eq!([a, d].map(|product| sequence.follow(product)), [d, a]);
        assert_eq!([b, c].map(|product| sequence.follow(product)), [a; 2]);
        assert_eq!(sequence.products, [a, d, b, c]);
    }

    #[test]
    fn products_that_never_repeat_are_forgotten() {
        let mut sequence = Sequence::default();
        for address in 0..2 * MOST_PRODUCTS + 10 {
            sequence.follow(product(&[(address, 64)]));
            assert!(sequence.products.len() <= MOST_PRODUCTS && sequence.next <= sequence.products.len());
        }
        assert_eq!(
            sequence.follow(product(&[(2 * MOST_PRODUCTS, 64)])).first().map(|piece| piece.address),
            Some(2 * MOST_PRODUCTS + 1)
        );
    }

    #[test]
    fn shares_follow_each_other_through_the_weights() {
        let product = product(&[(1000, 300), (5000, 100), (9000, 200)]);
        let of = |share| of_share(product, share, 3).map(|piece| (piece.address, piece.bytes));
        assert_eq!(of(0), [(1000, 200), (5000, 0), (9000, 0), (0, 0)]);
        assert_eq!(of(1), [(1200, 100), (5000, 100), (9000, 0), (0, 0)]);
        assert_eq!(of(2)[2], (9000, 200));
        // Threads without a share, and a share that exceeds what is asked for.
        assert!(of(3).iter().all(|&(_, bytes)| bytes == 0));
        let large = of_share(
            Product::from([
                Piece { address: 0, bytes: 10 * MOST_BYTES },
                Piece::default(),
                Piece::default(),
                Piece::default(),
            ]),
            1,
            2,
        );
        assert_eq!(large[0], Piece { address: 5 * MOST_BYTES, bytes: MOST_BYTES });
        // What two announcements at once may look like.
        of_share([Piece { address: usize::MAX, bytes: usize::MAX }; MOST_WEIGHTS], 5, 0);
        of_share([Piece { address: usize::MAX, bytes: usize::MAX }; MOST_WEIGHTS], 2, 3);
    }

    #[test]
    fn every_line_of_a_share_is_asked_for_once() {
        let mut asked = Asked { number: 0, pieces: product(&[(0, 0), (1024, 4 * 256), (1 << 20, 100)]) };
        let lines: Vec<usize> = std::iter::from_fn(|| asked.next()).collect();
        assert_eq!(lines, [1024, 1280, 1536, 1792, 1 << 20]);
    }

    #[test]
    fn any_address_may_be_asked_for() {
        for address in [0, 1, 0x8000_0000_0000, usize::MAX] {
            prefetch(address);
        }
    }
}
