//! The innermost loop: some rows times some panels, accumulators in registers.

use super::{Operands, Strides};
use crate::lanes::{Element, Lanes};
use crate::matrix::PANEL;
use crate::pool::Shares;

/// Steps of k between two looks at the loop's end. Addresses are computed once for all of them: where another process has the
/// other half of a core, instructions are what is short.
const STEPS: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Some steps of k, for some rows.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// As [`Parts::side_by_side`](super::rows::Parts::side_by_side) lays it.
    pub(super) x: &'a [f32],
    /// First step of k, and how many.
    pub(super) from: usize,
    pub(super) depth: usize,
    pub(super) keep: bool,
}

/// Where a tile reads and writes.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) row: usize,
    pub(super) panel: usize,
    /// Where this tile's x begins in the block's, and its first panel in w.
    pub(super) x: usize,
    pub(super) w: usize,
    /// How far from its first panel begins what it fetches ahead: a share of what comes next, for each of `tiles`.
    pub(super) next: usize,
    pub(super) tiles: usize,
}

/// Calls the tile of this size.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn sized<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    block: Block<'_>,
    place: Place,
    height: usize,
    width: usize,
) {
    macro_rules! sizes {
        ($($height:literal $width:literal),*) => {
            match (height, width) {
                // SAFETY: as for this function.
                $(($height, $width) => unsafe { tile::<V, E, $height, $width>(operands, y, block, place) },)*
                _ => unreachable!("no tile of {height} rows and {width} panels"),
            }
        };
    }
    sizes!(
        1 4, 1 2, 2 4, 3 4, 4 4, 5 4, 2 2, 3 2, 4 2, 5 2, 1 1, 2 1, 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 9 1, 10 1, 11 1, 12 1, 6 2, 7 2, 8 2, 9 2, 10 2, 11 2, 12 2
    );
}

/// R rows times P panels; the accumulators stay in registers.
///
/// # Safety
/// Rows `row..row + R` and panels `panel..panel + P` lie within y, and nobody else uses these elements of it. The block's x holds
/// `depth * R` floats from `x` on. For each p of P, w holds `depth` steps of PANEL elements, `w_step` apart, from
/// `place.w + p * w_panel` on; beside each other if two of them take turns.
#[expect(clippy::needless_range_loop, reason = "constant indices keep the accumulators in registers")]
#[inline(always)]
unsafe fn tile<V: Lanes, E: Element, const R: usize, const P: usize>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    block: Block<'_>,
    place: Place,
) {
    if R > E::tile_rows::<V>() || (R * P > V::TILE.0 * V::TILE.1 && R > 1) {
        unreachable!("accumulators of {R} rows and {P} panels do not fit into these registers");
    }
    let Operands { w, shape: [_, _, n], strides: Strides { w_step, w_panel, y_row, y_panel, .. }, .. } = operands;
    let (Block { depth, keep, .. }, Place { row, panel, next, tiles, .. }) = (block, place);
    // SAFETY: inside the block's x, by the promise above.
    let mut x = unsafe { block.x.as_ptr().add(place.x) };
    // SAFETY: inside w, by the promise above.
    let mut ws: [*const E; P] = std::array::from_fn(|p| unsafe { w.as_ptr().add(place.w + p * w_panel) });
    let share = if w_panel > w_step { w_step.div_ceil(tiles) } else { w_step };
    // SAFETY: inside y, by the promise above.
    let at = |r: usize, p: usize| unsafe { y.pointer().add((row + r) * y_row + (panel + p) * y_panel) };
    let width = |p: usize| PANEL.min(n - (panel + p) * PANEL);
    let is_whole = width(P - 1) == PANEL;
    // Loops over accumulators do next to nothing else: where one is not unrolled, all accumulators stay in memory.
    let mut acc = [[V::splat(0.0); P]; R];
    if keep && is_whole {
        for r in 0..R {
            for p in 0..P {
                // SAFETY: sixteen floats stand there, and no other thread uses them.
                acc[r][p] = V::load(unsafe { &*at(r, p).cast() });
            }
        }
    } else if keep {
        let mut part = [[[0.0_f32; PANEL]; P]; R];
        for (r, part) in part.iter_mut().enumerate() {
            for (p, part) in part.iter_mut().enumerate() {
                // SAFETY: `width(p)` floats stand there, and no other thread uses them.
                part[..width(p)].copy_from_slice(unsafe { std::slice::from_raw_parts(at(r, p), width(p)) });
            }
        }
        for r in 0..R {
            for p in 0..P {
                acc[r][p] = V::load(&part[r][p]);
            }
        }
    }
    let mut ahead = ws.map(|w| w.wrapping_add(next));
    let mut rest = depth;
    // Two steps from the one `$first` from here. Not a closure: it would not be compiled for the instruction set.
    macro_rules! pair {
        ($first:expr) => {
            for step in 0..2 {
                let mut w = [V::splat(0.0); P];
                for p in 0..P {
                    // SAFETY: two steps that are left of a panel.
                    let both = unsafe { &*ws[p].add($first * PANEL).cast() };
                    w[p] = if step == 0 { E::even(both) } else { E::odd(both) };
                }
                for r in 0..R {
                    // SAFETY: a step of R rows that is left.
                    let x = V::splat(unsafe { *x.add(($first + step) * R + r) });
                    for p in 0..P {
                        acc[r][p] = E::mul_add(x, w[p], acc[r][p]);
                    }
                }
            }
        };
    }
    // The same STEPS / 2 times, with something before each.
    macro_rules! steps {
        ($pair:ident, $before:block) => {
            for $pair in 0..STEPS / 2 {
                $before
                pair!($pair * 2);
            }
            // SAFETY: at most one past the last step.
            unsafe {
                x = x.add(STEPS * R);
                ws = ws.map(|w| w.add(STEPS * PANEL));
            }
            rest -= STEPS;
        };
    }
    // Steps that stand side by side: a distance that is known makes them one address. A single row waits for memory only, and
    // for that prefetches are best spread evenly.
    let is_packed = w_step == PANEL && R > 1;
    let lines = (STEPS * PANEL * size_of::<E>() / LINE).div_ceil(tiles);
    // A tile alone spreads them over its steps, too: at once they would stand in the way of what is needed now. Of bf16 that is
    // widened they are half as many.
    while is_packed && tiles == 1 && size_of::<E>() == size_of::<f32>() && rest >= STEPS {
        steps!(pair, {
            for p in 0..P {
                V::prefetch(ahead[p].wrapping_add(pair * PANEL).cast());
                V::prefetch(ahead[p].wrapping_add((pair + STEPS / 2) * PANEL).cast());
            }
        });
        ahead = ahead.map(|ahead| ahead.wrapping_add(STEPS * PANEL));
    }
    while is_packed && rest >= STEPS {
        for p in 0..P {
            let line = |i: usize| ahead[p].cast::<u8>().wrapping_add(i * LINE);
            V::prefetch(line(0));
            // Not a loop: the accumulators would fall out of their registers.
            if lines > 1 {
                V::prefetch(line(1));
            }
            if lines > 2 {
                V::prefetch(line(2));
                V::prefetch(line(3));
            }
            ahead[p] = ahead[p].cast::<u8>().wrapping_add(lines * LINE).cast();
        }
        steps!(pair, {});
    }
    while w_step == PANEL && rest >= 2 {
        for p in 0..P {
            V::prefetch(ahead[p].cast());
            V::prefetch(ahead[p].wrapping_add(share).cast());
            ahead[p] = ahead[p].wrapping_add(2 * share);
        }
        pair!(0);
        ws = ws.map(|w| w.wrapping_add(2 * PANEL));
        x = x.wrapping_add(2 * R);
        rest -= 2;
    }
    // Addresses may pass the end once the last step is read.
    while rest > 0 {
        let mut w = [V::splat(0.0); P];
        for p in 0..P {
            // SAFETY: a step of a panel, so that the sixteen numbers lie inside w.
            w[p] = E::lanes(unsafe { &*ws[p].cast() });
            V::prefetch(ahead[p].cast());
            ahead[p] = ahead[p].wrapping_add(share);
            ws[p] = ws[p].wrapping_add(w_step);
        }
        for r in 0..R {
            // SAFETY: a step of R rows.
            let x = V::splat(unsafe { *x.add(r) });
            for p in 0..P {
                acc[r][p] = E::mul_add(x, w[p], acc[r][p]);
            }
        }
        x = x.wrapping_add(R);
        rest -= 1;
    }
    if is_whole {
        for r in 0..R {
            for p in 0..P {
                // SAFETY: as for the loads.
                acc[r][p].store(unsafe { &mut *at(r, p).cast() });
            }
        }
        return;
    }
    let mut part = [[[0.0_f32; PANEL]; P]; R];
    for r in 0..R {
        for p in 0..P {
            acc[r][p].store(&mut part[r][p]);
        }
    }
    for (r, part) in part.iter().enumerate() {
        for (p, part) in part.iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { std::slice::from_raw_parts_mut(at(r, p), width(p)) }.copy_from_slice(&part[..width(p)]);
        }
    }
}
