// Matches of two sets of descriptors, and the fundamental matrix that most of them agree with.

// Mutual nearest neighbors of unit descriptors (rows of length dim), whose distance is below
// `ratio` times that of the second nearest neighbor, in both images:
// [{a, b, similarity}], in the order of a.
export function mutualMatches(a, b, dim, ratio) {
  const [countA, countB] = [a.length / dim, b.length / dim];
  const rows = best(countA), columns = best(countB);
  for (let i = 0; i < countA; i++) {
    for (let j = 0; j < countB; j++) {
      let sum = 0;
      for (let k = 0, p = i * dim, q = j * dim; k < dim; k++, p++, q++) sum += a[p] * b[q];
      update(rows, i, j, sum);
      update(columns, j, i, sum);
    }
  }
  const matches = [];
  for (let i = 0; i < countA; i++) {
    const j = rows.index[i];
    if (j < 0 || columns.index[j] !== i) continue;
    if (!distinct(rows, i, ratio) || !distinct(columns, j, ratio)) continue;
    matches.push({ a: i, b: j, similarity: rows.first[i] });
  }
  return matches;
}

function best(count) {
  return {
    index: new Int32Array(count).fill(-1),
    first: new Float32Array(count).fill(-2),
    second: new Float32Array(count).fill(-2),
  };
}

function update(found, i, j, similarity) {
  if (similarity > found.first[i]) {
    found.second[i] = found.first[i];
    found.first[i] = similarity;
    found.index[i] = j;
  } else if (similarity > found.second[i]) {
    found.second[i] = similarity;
  }
}

// Squared distances of unit vectors are 2 - 2 cos.
function distinct(found, i, ratio) {
  return 1 - found.first[i] < ratio * ratio * (1 - found.second[i]);
}

// The fundamental matrix F (9 numbers, row by row; b' F a = 0) with the largest number of inliers:
// {matrix, inliers}; matrix is null if there are fewer than `minimum` inliers.
// `points` are [xa, ya, xb, yb], `threshold` the largest Sampson distance of an inlier in pixels.
export function fundamental(points, threshold, { seed = 0, limit = 5000, minimum = 15 } = {}) {
  let found = { matrix: null, inliers: points.map(() => false), count: 0 };
  if (points.length < Math.max(8, minimum)) return found;
  const random = generator(seed);
  const scale = normalization(points);
  const scaled = points.map((p) => p.map((value, k) => (value - scale.center[k]) * scale.factor));
  const bound = (threshold * scale.factor) ** 2;
  let needed = limit;
  for (let i = 0; i < needed; i++) {
    for (const matrix of sevenPoint(sample(scaled, 7, random))) {
      const inliers = scaled.map((p) => sampson(matrix, p) <= bound);
      const count = inliers.filter(Boolean).length;
      if (count <= found.count) continue;
      found = { matrix, inliers, count };
      const share = (count / points.length) ** 7;
      needed = Math.min(limit, Math.ceil(Math.log(0.001) / Math.log(1 - Math.min(share, 0.999))));
    }
  }
  if (found.count < minimum) return { ...found, matrix: null, inliers: points.map(() => false) };
  return { ...found, matrix: unscale(found.matrix, scale) };
}

// Random numbers in [0, 1) (Mulberry32).
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function sample(items, count, random) {
  const chosen = new Set();
  while (chosen.size < count) chosen.add(Math.floor(random() * items.length));
  return [...chosen].map((i) => items[i]);
}

// One factor for both images, so that distances stay comparable.
function normalization(points) {
  const center = [0, 1, 2, 3].map((k) => points.reduce((s, p) => s + p[k], 0) / points.length);
  const spread = points.reduce(
    (s, p) => s + p.reduce((t, value, k) => t + (value - center[k]) ** 2, 0), 0) / points.length;
  return { center, factor: 1 / Math.sqrt(Math.max(spread / 4, 1e-12)) };
}

function unscale(f, { center, factor: s }) {
  const a = [[s, 0, -s * center[0]], [0, s, -s * center[1]], [0, 0, 1]];
  const b = [[s, 0, -s * center[2]], [0, s, -s * center[3]], [0, 0, 1]];
  const out = [];
  for (let i = 0; i < 3; i++) {
    for (let j = 0; j < 3; j++) {
      let sum = 0;
      for (let k = 0; k < 3; k++) {
        for (let l = 0; l < 3; l++) sum += b[k][i] * f[3 * k + l] * a[l][j];
      }
      out.push(sum);
    }
  }
  return out;
}

// Squared Sampson distance.
function sampson(f, [xa, ya, xb, yb]) {
  const lx = f[0] * xa + f[1] * ya + f[2], ly = f[3] * xa + f[4] * ya + f[5];
  const lz = f[6] * xa + f[7] * ya + f[8];
  const mx = f[0] * xb + f[3] * yb + f[6], my = f[1] * xb + f[4] * yb + f[7];
  const error = xb * lx + yb * ly + lz;
  return (error * error) / (lx * lx + ly * ly + mx * mx + my * my + 1e-300);
}

// The one to three matrices of rank 2 that seven points determine.
function sevenPoint(points) {
  const rows = points.map(([xa, ya, xb, yb]) =>
    [xb * xa, xb * ya, xb, yb * xa, yb * ya, yb, xa, ya, 1]);
  const basis = nullSpace(rows);
  if (!basis) return [];
  const [f, g] = basis;
  const mix = (t) => f.map((value, k) => t * value + (1 - t) * g[k]);
  // det(mix(t)) is a polynomial of degree 3, given by its values
  const [p0, p1, p2, p3] = [0, 1, -1, 2].map((t) => determinant(mix(t)));
  const c0 = p0, c2 = (p1 + p2) / 2 - p0;
  const c3 = (p3 - 2 * p1 - 2 * c2 + c0) / 6, c1 = p1 - c0 - c2 - c3;
  return cubicRoots(c3, c2, c1, c0).map(mix);
}

function determinant(m) {
  return m[0] * (m[4] * m[8] - m[5] * m[7]) - m[1] * (m[3] * m[8] - m[5] * m[6])
    + m[2] * (m[3] * m[7] - m[4] * m[6]);
}

// Two vectors that span the null space of seven rows of nine numbers; null if it is larger.
function nullSpace(rows) {
  const order = [...Array(9).keys()];
  for (let i = 0; i < 7; i++) {
    let [row, column] = [i, i];
    for (let r = i; r < 7; r++) {
      for (let c = i; c < 9; c++) {
        const largest = Math.abs(rows[row][order[column]]);
        if (Math.abs(rows[r][order[c]]) > largest) [row, column] = [r, c];
      }
    }
    [rows[i], rows[row]] = [rows[row], rows[i]];
    [order[i], order[column]] = [order[column], order[i]];
    const pivot = rows[i][order[i]];
    if (Math.abs(pivot) < 1e-10) return null;
    for (let r = 0; r < 7; r++) {
      if (r === i) continue;
      const factor = rows[r][order[i]] / pivot;
      if (factor) for (let c = 0; c < 9; c++) rows[r][c] -= factor * rows[i][c];
    }
  }
  return [7, 8].map((free) => {
    const vector = new Array(9).fill(0);
    vector[order[free]] = 1;
    for (let i = 0; i < 7; i++) vector[order[i]] = -rows[i][order[free]] / rows[i][order[i]];
    return vector;
  });
}

// Real roots of a t^3 + b t^2 + c t + d.
function cubicRoots(a, b, c, d) {
  const largest = Math.max(Math.abs(a), Math.abs(b), Math.abs(c), Math.abs(d));
  if (!(largest > 0)) return [];
  if (Math.abs(a) < 1e-12 * largest) {
    if (Math.abs(b) < 1e-12 * largest) return c ? [-d / c] : [];
    const root = c * c - 4 * b * d;
    return root < 0 ? [] : [1, -1].map((sign) => (-c + sign * Math.sqrt(root)) / (2 * b));
  }
  const shift = b / (3 * a);
  const p = c / a - 3 * shift * shift;
  const q = 2 * shift ** 3 - (shift * c) / a + d / a;
  const discriminant = (q / 2) ** 2 + (p / 3) ** 3;
  if (discriminant > 0) {
    const root = Math.sqrt(discriminant);
    return [Math.cbrt(-q / 2 + root) + Math.cbrt(-q / 2 - root) - shift];
  }
  const radius = 2 * Math.sqrt(Math.max(-p / 3, 0));
  if (radius === 0) return [-shift];
  const angle = Math.acos(Math.min(1, Math.max(-1, (3 * q) / (p * radius)))) / 3;
  return [0, 1, 2].map((k) => radius * Math.cos(angle - (2 * Math.PI * k) / 3) - shift);
}
