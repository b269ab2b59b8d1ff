//! Weights that the next product reads: threads that wait for work ask memory for them meanwhile.
//!
//! Between two products one thread normalizes, rotates and adds, and memory would have nothing to do. Which product follows
//! is learned from the calls before: most models run their products in the same order every time. A wrong guess costs some
//! bandwidth; no result depends on it.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::gemv::WEIGHTS_AT_A_TIME;
use crate::matrix::{Data, Matrix};

/// Bytes that a thread asks for: a part of its second-level cache.
const MOST_BYTES: usize = 1 << 17;

/// Products that are remembered.
const MOST_PRODUCTS: usize = 1 << 10;

/// Cache lines that are asked for between two looks for work.
const LINES: usize = 4;

/// The bytes of a cache line.
const LINE: usize = 64;

/// Where a weight's codes lie. Nothing is read through the address, which may be that of a model that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Piece {
    address: usize,
    bytes: usize,
}

/// A product's weights, one after the other.
type Product = [Piece; WEIGHTS_AT_A_TIME];

/// No weights.
const NOTHING: Product = [Piece { address: 0, bytes: 0 }; WEIGHTS_AT_A_TIME];

/// Products in the order in which they first came.
struct Sequence {
    products: Vec<Product>,
    /// The place of the next product.
    next: usize,
    /// The place that followed the end when it was last reached.
    again: usize,
}

impl Sequence {
    /// Takes note of a product, and gives the one that followed it before; nothing if there is none.
    fn follow(&mut self, product: Product) -> Product {
        let expected = if self.next < self.products.len() { self.next } else { self.again };
        if self.products.get(expected) == Some(&product) {
            self.next = expected;
        } else if let Some(place) = self.products.iter().rposition(|known| *known == product) {
            if self.next == self.products.len() {
                self.again = place;
            }
            self.next = place;
        } else {
            if self.products.len() == MOST_PRODUCTS {
                self.products.clear();
            }
            self.next = self.products.len();
            self.again = usize::MAX;
            self.products.push(product);
        }
        self.next += 1;
        let expected = if self.next < self.products.len() { self.next } else { self.again };
        self.products.get(expected).copied().unwrap_or(NOTHING)
    }
}

thread_local! {
    /// Of the products that this thread runs.
    static SEQUENCE: RefCell<Sequence> =
        const { RefCell::new(Sequence { products: Vec::new(), next: 0, again: usize::MAX }) };
    /// What this thread has yet to ask for.
    static ASKED: RefCell<Asked> = const { RefCell::new(Asked { number: 0, pieces: NOTHING, next: 0 }) };
}

/// What was announced last.
static ANNOUNCED: Announced = Announced {
    number: AtomicUsize::new(0),
    shares: AtomicUsize::new(1),
    pieces: [const { [AtomicUsize::new(0), AtomicUsize::new(0)] }; WEIGHTS_AT_A_TIME],
};

/// A product whose weights are read next. Its parts may be seen from two announcements at once, which only asks for the
/// wrong bytes.
struct Announced {
    number: AtomicUsize,
    /// Threads that share the weights.
    shares: AtomicUsize,
    pieces: [[AtomicUsize; 2]; WEIGHTS_AT_A_TIME],
}

/// What one thread has yet to ask for of an announced product.
struct Asked {
    number: usize,
    pieces: Product,
    /// No piece before this one has bytes left.
    next: usize,
}

impl Asked {
    /// Where the next [`LINES`] start.
    fn lines(&mut self) -> Option<usize> {
        let piece = loop {
            let piece = self.pieces.get_mut(self.next)?;
            if piece.bytes > 0 {
                break piece;
            }
            self.next += 1;
        };
        let address = piece.address;
        piece.address = address.wrapping_add(LINE * LINES);
        piece.bytes = piece.bytes.saturating_sub(LINE * LINES);
        Some(address)
    }
}

/// Says that a product of `weights` starts now on `shares` threads, which have about equal shares, in order.
pub(super) fn announce(weights: &[Matrix], shares: usize) {
    let mut product = NOTHING;
    for (piece, w) in product.iter_mut().zip(weights) {
        let codes = match w.data() {
            Data::Float { values, .. } => values,
            Data::Quantized { codes, .. } => codes,
        };
        *piece = Piece { address: codes.as_ptr().addr(), bytes: codes.len() };
    }
    let ahead = SEQUENCE.with_borrow_mut(|sequence| sequence.follow(product));
    for ([address, bytes], piece) in ANNOUNCED.pieces.iter().zip(ahead) {
        address.store(piece.address, Ordering::Relaxed);
        bytes.store(piece.bytes, Ordering::Relaxed);
    }
    ANNOUNCED.shares.store(shares, Ordering::Relaxed);
    ANNOUNCED.number.fetch_add(1, Ordering::Release);
}

/// Asks memory for some lines of a share of what was announced; `false` if there are no more.
#[inline]
pub(super) fn ask(share: usize) -> bool {
    if !cfg!(target_arch = "x86_64") {
        return false;
    }
    ASKED.with_borrow_mut(|asked| {
        let number = ANNOUNCED.number.load(Ordering::Acquire);
        if asked.number != number {
            let pieces = ANNOUNCED.pieces.each_ref().map(|[address, bytes]| Piece {
                address: address.load(Ordering::Relaxed),
                bytes: bytes.load(Ordering::Relaxed),
            });
            let pieces = of_share(pieces, share, ANNOUNCED.shares.load(Ordering::Relaxed));
            *asked = Asked { number, pieces, next: 0 };
        }
        let lines = asked.lines();
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
    unreachable!("nobody asks for {address} here");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(pieces: &[(usize, usize)]) -> Product {
        let mut product = NOTHING;
        for (piece, &(address, bytes)) in product.iter_mut().zip(pieces) {
            *piece = Piece { address, bytes };
        }
        product
    }

    /// The addresses that are expected after each of some products, 0 for none.
    fn expected(sequence: &mut Sequence, addresses: &[usize]) -> Vec<usize> {
        addresses.iter().map(|&address| sequence.follow(product(&[(address, 64)]))[0].address).collect()
    }

    fn sequence() -> Sequence {
        Sequence { products: Vec::new(), next: 0, again: usize::MAX }
    }

    #[test]
    fn the_order_of_the_last_token_is_expected_again() {
        let mut sequence = sequence();
        assert_eq!(expected(&mut sequence, &[1, 2, 3]), [0, 0, 0]);
        assert_eq!(expected(&mut sequence, &[1, 2, 3]), [2, 3, 1]);
        assert_eq!(expected(&mut sequence, &[1, 2, 3]), [2, 3, 1]);
        // Another model, once its order is known.
        assert_eq!(expected(&mut sequence, &[7, 8, 9]), [0, 0, 0]);
        assert_eq!(expected(&mut sequence, &[7, 8, 9, 7]), [8, 9, 7, 8]);
    }

    #[test]
    fn what_came_once_is_not_expected_again() {
        let mut sequence = sequence();
        assert_eq!(expected(&mut sequence, &[1, 5, 5, 5, 5]), [0, 0, 5, 5, 5]);
        assert_eq!(sequence.products.len(), 2);
    }

    #[test]
    fn experts_change_from_token_to_token() {
        let mut sequence = sequence();
        expected(&mut sequence, &[1, 20, 3, 4]);
        expected(&mut sequence, &[1, 21, 3, 4]);
        // What follows the chosen expert is known although another one was expected.
        assert_eq!(expected(&mut sequence, &[1, 20, 3, 4])[1..3], [3, 4]);
        assert_eq!(sequence.products.len(), 5);
    }

    #[test]
    fn products_that_never_repeat_are_forgotten() {
        let mut sequence = sequence();
        for address in 1..3 * MOST_PRODUCTS {
            assert_eq!(expected(&mut sequence, &[address]), [0]);
            assert!(sequence.products.len() <= MOST_PRODUCTS);
        }
    }

    #[test]
    fn shares_follow_each_other_through_the_weights() {
        let product = product(&[(1000, 300), (5000, 100), (9000, 200)]);
        let of = |share| of_share(product, share, 3).map(|piece| (piece.address, piece.bytes));
        assert_eq!(of(0)[..3], [(1000, 200), (5000, 0), (9000, 0)]);
        assert_eq!(of(1)[..3], [(1200, 100), (5000, 100), (9000, 0)]);
        assert_eq!(of(2)[2], (9000, 200));
        // Threads without a share, and a share that exceeds what is asked for.
        assert!(of(3).iter().all(|&(_, bytes)| bytes == 0));
        let mut whole = NOTHING;
        whole[0].bytes = 10 * MOST_BYTES;
        let large = of_share(whole, 1, 2);
        assert_eq!(large[0], Piece { address: 5 * MOST_BYTES, bytes: MOST_BYTES });
        // What two announcements at once may look like.
        of_share([Piece { address: usize::MAX, bytes: usize::MAX }; WEIGHTS_AT_A_TIME], 5, 0);
        of_share([Piece { address: usize::MAX, bytes: usize::MAX }; WEIGHTS_AT_A_TIME], 2, 3);
    }

    #[test]
    fn every_line_of_a_share_is_asked_for_once() {
        let mut asked = Asked { number: 0, pieces: product(&[(0, 0), (1024, 4 * 256), (1 << 20, 100)]), next: 0 };
        let lines: Vec<usize> = std::iter::from_fn(|| asked.lines()).collect();
        assert_eq!(lines, [1024, 1280, 1536, 1792, 1 << 20]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn any_address_may_be_asked_for() {
        for address in [0, 1, 0x8000_0000_0000, usize::MAX] {
            prefetch(address);
        }
    }
}
