// Matches of two sets of descriptors that agree with their neighbors, and the fundamental matrix that
// most of them agree with.

// As in tiepoints.matching: neighbors of a match, their smallest distance and the error of their
// positions in units of the scale, the largest deviation relative to the distance, the largest
// change of the ratio of scales, and how rotation and linear map are estimated.
const NEIGHBORS = 24, NEIGHBOR_DISTANCE = 6, POSITION_ERROR = 3;
const MAX_DEVIATION = 0.35, MAX_SCALE_CHANGE = 1.7;
const ROTATION_BINS = 36, LINEAR_STEPS = 2, PRIOR_NEIGHBORS = 20;

// As in tiepoints.verification: matches that determine a matrix, how many there may be, the largest
// expected number of as good ones by chance, and the incorrect matches that tell what chance is.
const SAMPLE = 7, SOLUTIONS = 3, FALSE_ALARMS = 1e-3, RANDOM_PAIRS = 16384;

// Mutual nearest neighbors of unit descriptors (rows of length dim): [{a, b, similarity}], in the
// order of a.
export function mutualMatches(a, b, dim) {
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
    matches.push({ a: i, b: j, similarity: rows.first[i] });
  }
  return matches;
}

function best(count) {
  return {
    index: new Int32Array(count).fill(-1),
    first: new Float32Array(count).fill(-2),
  };
}

function update(found, i, j, similarity) {
  if (similarity > found.first[i]) {
    found.first[i] = similarity;
    found.index[i] = j;
  }
}

// The matches with which at least `minimum` neighboring ones agree, as `filter_by_neighbors` of the
// Python package; `a` and `b` are upright keypoints: {xy: [[x, y]], scales}.
export function agreeingMatches(matches, a, b, minimum) {
  const neighbors = neighboring(matches, a, b);
  const rotation = dominantRotation(neighbors.filter(({ x, y }) =>
    Math.abs(length(y) / length(x) - 1) < MAX_DEVIATION));
  let map = [rotation, [0, 0]];
  for (let step = 0; step < LINEAR_STEPS; step++) {
    map = linearMap(neighbors.filter((n) => agrees(n, map)), rotation);
  }
  const counts = new Int32Array(matches.length);
  for (const neighbor of neighbors) counts[neighbor.match] += agrees(neighbor, map);
  return matches.filter((_, i) => counts[i] >= minimum);
}

// Vectors in both images from each match to its nearest ones, the first one times the ratio of the
// scales (x), and the largest deviation of the second one (y): [{match, x, y, tolerance}].
function neighboring(matches, a, b) {
  const found = [];
  matches.forEach((match, i) => {
    const [pa, pb] = [a.xy[match.a], b.xy[match.b]];
    const [scaleA, scaleB] = [a.scales[match.a], b.scales[match.b]];
    for (const { other, distance } of nearestMatches(matches, a.xy, pa, NEIGHBOR_DISTANCE * scaleA)) {
      const y = difference(b.xy[other.b], pb);
      if (length(y) < NEIGHBOR_DISTANCE * scaleB) continue;
      const change = (b.scales[other.b] * scaleA) / (a.scales[other.a] * scaleB);
      if (Math.abs(Math.log(change)) >= Math.log(MAX_SCALE_CHANGE)) continue;
      const x = difference(a.xy[other.a], pa).map((value) => value * scaleB / scaleA);
      const tolerance = MAX_DEVIATION + POSITION_ERROR * scaleA / distance;
      found.push({ match: i, x, y, tolerance });
    }
  });
  return found;
}

// The nearest matches to a position in the first image that have at least a smallest distance:
// [{other, distance}], in the order of distances.
function nearestMatches(matches, xy, position, smallest) {
  const nearest = [];
  for (const other of matches) {
    const distance = length(difference(xy[other.a], position));
    const full = nearest.length === NEIGHBORS;
    if (distance < smallest || (full && distance >= nearest[NEIGHBORS - 1].distance)) continue;
    if (full) nearest.pop();
    let place = nearest.length;
    while (place > 0 && nearest[place - 1].distance > distance) place--;
    nearest.splice(place, 0, { other, distance });
  }
  return nearest;
}

// Whether y is about where the linear map x -> f x + g conj(x) of complex numbers predicts it.
function agrees({ x, y, tolerance }, [f, g]) {
  const predicted = sum(product(f, x), product(g, conjugate(x)));
  return length(difference(y, predicted)) < tolerance * length(predicted);
}

// The most frequent direction of y / x, of length 1: the mean of the three adjacent bins that hold
// most.
function dominantRotation(neighbors) {
  const width = 2 * Math.PI / ROTATION_BINS;
  const angles = neighbors.map(({ x, y }) => {
    const [re, im] = product(y, conjugate(x));
    return Math.atan2(im, re);
  });
  const counts = new Array(ROTATION_BINS).fill(0);
  const bin = (k) => (k + ROTATION_BINS) % ROTATION_BINS;
  for (const angle of angles) counts[bin(Math.floor(angle / width))]++;
  const smooth = counts.map((count, k) => count + counts[bin(k - 1)] + counts[bin(k + 1)]);
  const middle = width * (smooth.indexOf(Math.max(...smooth)) + 0.5);
  let total = [0, 0];
  for (const angle of angles) {
    const offset = Math.atan2(Math.sin(angle - middle), Math.cos(angle - middle));
    if (Math.abs(offset) < 1.5 * width) total = sum(total, [Math.cos(angle), Math.sin(angle)]);
  }
  const size = length(total);
  return size > 0 ? total.map((value) => value / size) : [1, 0];
}

// [f, g] of the linear map y = f x + g conj(x) by least squares of the errors relative to |x|;
// PRIOR_NEIGHBORS more agree with the rotation `prior`.
function linearMap(neighbors, prior) {
  let square = [0, 0], p = prior.map((value) => PRIOR_NEIGHBORS * value), q = [0, 0];
  for (const neighbor of neighbors) {
    const size = length(neighbor.x);
    const [x, y] = [neighbor.x, neighbor.y].map((v) => v.map((value) => value / size));
    square = sum(square, product(x, x));
    p = sum(p, product(y, conjugate(x)));
    q = sum(q, product(y, x));
  }
  const weight = neighbors.length + PRIOR_NEIGHBORS;
  const determinant = weight ** 2 - length(square) ** 2;
  const solved = (own, other, factor) => difference(own.map((value) => weight * value),
    product(factor, other)).map((value) => value / determinant);
  return [solved(p, q, conjugate(square)), solved(q, p, square)];
}

// Vectors and complex numbers [x, y].
const length = ([x, y]) => Math.hypot(x, y);
const sum = ([a, b], [c, d]) => [a + c, b + d];
const difference = ([a, b], [c, d]) => [a - c, b - d];
const product = ([a, b], [c, d]) => [a * c - b * d, a * d + b * c];
const conjugate = ([a, b]) => [a, -b];

// The fundamental matrix F (9 numbers, row by row; b' F a = 0) with the largest number of inliers:
// {matrix, inliers}; matrix is null if there are fewer than `minimum` inliers.
// `points` are [xa, ya, xb, yb], `threshold` the largest Sampson distance of an inlier in pixels; of
// at least `least` samples, as noise makes some that are free of outliers better than others.
export function fundamental(
  points, threshold, { seed = 0, least = 500, limit = 5000, minimum = 15 } = {},
) {
  let found = { matrix: null, inliers: points.map(() => false), count: 0 };
  if (points.length < Math.max(8, minimum)) return found;
  const random = generator(seed);
  const scale = normalization(points);
  const scaled = points.map((p) => p.map((value, k) => (value - scale.center[k]) * scale.factor));
  const bound = (threshold * scale.factor) ** 2;
  let needed = limit;
  for (let i = 0; i < needed; i++) {
    for (const matrix of sevenPoint(sample(scaled, SAMPLE, random))) {
      const inliers = scaled.map((p) => sampson(matrix, p) <= bound);
      const count = inliers.filter(Boolean).length;
      if (count <= found.count) continue;
      found = { matrix, inliers, count };
      const share = (count / points.length) ** 7;
      const enough = Math.ceil(Math.log(0.001) / Math.log(1 - Math.min(share, 0.999)));
      needed = Math.min(limit, Math.max(least, enough));
    }
  }
  if (found.count < minimum) return { ...found, matrix: null, inliers: points.map(() => false) };
  return { ...found, matrix: unscale(found.matrix, scale) };
}

// Whether more of all nearest neighbors agree with a fundamental matrix than chance explains, by the
// number of false alarms, as `verification` of the Python package has it. `points` as above.
export function beyondChance(points, matrix, threshold) {
  const bound = threshold ** 2;
  const inliers = points.filter((p) => sampson(matrix, p) <= bound);
  // keypoints of one place at several scales count once
  const count = new Set(inliers.map((p) => p.map((v) => Math.floor(v / threshold)).join())).size;
  if (count <= SAMPLE) return false;
  const random = generator(0);
  let [pairs, agreeing] = [0, 0];
  for (let draw = 0; draw < RANDOM_PAIRS; draw++) {
    const [one, other] = sample(points, 2, random);
    if (one.every((value, k) => Math.abs(value - other[k]) <= threshold)) continue;
    pairs++;
    agreeing += sampson(matrix, [one[0], one[1], other[2], other[3]]) <= bound;
  }
  const chance = (agreeing + 1) / (pairs + 1);
  const total = Math.max(count, Math.round(points.length * count / inliers.length));
  return chance < 1 && logFalseAlarms(total, count, chance) <= Math.log(FALSE_ALARMS);
}

// log(3 C(n, 7) P(Binomial(n - 7, chance) >= k - 7)): of n matches, k agree with a matrix that seven
// of them determine.
function logFalseAlarms(n, k, chance) {
  const factorial = [0]; // logarithms
  for (let i = 1; i <= n; i++) factorial.push(factorial[i - 1] + Math.log(i));
  const choose = (m, l) => factorial[m] - factorial[l] - factorial[m - l];
  const rest = n - SAMPLE;
  const terms = [];
  for (let l = k - SAMPLE; l <= rest; l++) {
    terms.push(choose(rest, l) + l * Math.log(chance) + (rest - l) * Math.log1p(-chance));
  }
  const largest = Math.max(...terms);
  const tail = largest + Math.log(terms.reduce((s, term) => s + Math.exp(term - largest), 0));
  return Math.log(SOLUTIONS) + choose(n, SAMPLE) + Math.min(0, tail);
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
  const [f, g] = nullSpace(rows);
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

// Two vectors of the null space of seven rows of nine numbers, which is larger if the points fit many
// matrices, as those of a shifted image do.
function nullSpace(rows) {
  const order = [...Array(9).keys()];
  let rank = 0;
  for (; rank < 7; rank++) {
    const i = rank;
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
    if (Math.abs(pivot) < 1e-10) break;
    for (let r = 0; r < 7; r++) {
      if (r === i) continue;
      const factor = rows[r][order[i]] / pivot;
      if (factor) for (let c = 0; c < 9; c++) rows[r][c] -= factor * rows[i][c];
    }
  }
  return [rank, rank + 1].map((free) => {
    const vector = new Array(9).fill(0);
    vector[order[free]] = 1;
    for (let i = 0; i < rank; i++) vector[order[i]] = -rows[i][order[free]] / rows[i][order[i]];
    return vector;
  });
}

// Real roots of a t^3 + b t^2 + c t + d; 0 if it is 0 everywhere.
function cubicRoots(a, b, c, d) {
  const largest = Math.max(Math.abs(a), Math.abs(b), Math.abs(c), Math.abs(d));
  if (!(largest > 1e-12)) return [0];
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
