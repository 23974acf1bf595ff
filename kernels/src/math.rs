//! Scalar functions with fixed polynomials, so that their bits do not depend on the C library or the instruction set.

/// `e^x`, relative error below 2e-7; inputs are clamped to where the result is a normal number.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = (r * r).mul_add(p, r) + 1.0;
    // The integer stands in the low bits of the mantissa; a cast would keep compilers from using lanes.
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127);
    let scale = f32::from_bits(exponent << 23);
    y * scale
}

/// Natural logarithm of a positive normal number, relative error below 3e-7.
#[inline(always)]
#[must_use]
pub fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // Split x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
    let shifted = bits.wrapping_sub(0x3f35_04f3);
    let e = (shifted.cast_signed() >> 23) as f32;
    let m = f32::from_bits(bits.wrapping_sub(shifted & 0xff80_0000));
    ln_near_one(m - 1.0, e)
}

/// `ln(1 + f) + e ln 2` for f in [sqrt(1/2) - 1, sqrt(2) - 1).
#[inline(always)]
fn ln_near_one(f: f32, e: f32) -> f32 {
    let z = f * f;
    let p = 7.037_683_6e-2_f32;
    let p = p.mul_add(f, -1.151_461_e-1);
    let p = p.mul_add(f, 1.167_699_9e-1);
    let p = p.mul_add(f, -1.242_014_1e-1);
    let p = p.mul_add(f, 1.424_932_3e-1);
    let p = p.mul_add(f, -1.666_805_8e-1);
    let p = p.mul_add(f, 2.000_071_5e-1);
    let p = p.mul_add(f, -2.499_999_4e-1);
    let p = p.mul_add(f, 3.333_333e-1);
    let y = f * z * p;
    let y = e.mul_add(-2.121_944_4e-4, y);
    let y = z.mul_add(-0.5, y);
    e.mul_add(0.693_359_4, f + y)
}

/// `-ln(1 - t)` for t in (0, 1/2], exact to rounding also where t is tiny.
#[inline(always)]
#[must_use]
pub fn neg_ln_1m(t: f32) -> f32 {
    if t < 0.25 { -ln_near_one(-t, 0.0) } else { -ln(1.0 - t) }
}

/// Sum of `f` of each value: lane `i % 8` adds in order, lanes are added as a fixed tree. Terms are made a block ahead of their sum,
/// so that they take whole registers.
#[inline(always)]
pub fn lane_sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (mut lanes, mut terms) = ([0.0_f32; 8], [0.0_f32; 64]);
    for block in values.chunks(terms.len()) {
        for (term, value) in terms.iter_mut().zip(block) {
            *term = f(*value);
        }
        let (whole, rest) = terms[..block.len()].as_chunks::<8>();
        for eight in whole {
            for (lane, term) in lanes.iter_mut().zip(eight) {
                *lane += term;
            }
        }
        for (lane, term) in lanes.iter_mut().zip(rest) {
            *lane += term;
        }
    }
    reduce(lanes)
}

/// The largest of the values, sixteen at a time; a number that is none is passed over.
#[inline(always)]
#[must_use]
pub fn lane_max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for chunk in whole {
        lanes = std::array::from_fn(|i| larger(lanes[i], chunk[i]));
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}

/// Dot product in the lane order of [`lane_sum`], with fused multiply-adds.
#[inline(always)]
#[must_use]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (x, y) in a8.iter().zip(b8) {
        for j in 0..8 {
            lanes[j] = x[j].mul_add(y[j], lanes[j]);
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = x.mul_add(*y, *lane);
    }
    reduce(lanes)
}

#[inline(always)]
fn reduce(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_ln_are_close_to_f64() {
        for i in 0..200_000 {
            let x = (i as f32) * 8e-4 - 80.0;
            let want = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - want) / want).abs() < 2.5e-7, "exp({x})");
            let y = (i as f32 + 1.0) * 3.7e-3;
            let want = f64::from(y).ln();
            assert!((f64::from(ln(y)) - want).abs() < 3e-7 * want.abs().max(0.3), "ln({y})");
            let t = (i as f32 + 1.0) * 2.5e-6;
            let want = -(-f64::from(t)).ln_1p();
            assert!(((f64::from(neg_ln_1m(t)) - want) / want).abs() < 4e-7, "-ln(1 - {t})");
        }
    }
}
