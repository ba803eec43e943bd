// The kernels for NVIDIA GPUs; reference.py says what they compute, and they give the same bits.
//
// A whole walk is one launch, and one query is one block: it goes through all levels without a second launch and
// without a word to other blocks, since what a level needs of the level above is its frontier, which fits into shared
// memory. So one query takes one multiprocessor, and a batch takes them all.
//
// Upper halves are read by 4 lanes, 16 bytes each, so that a warp reads 8 rows that lie side by side; whole rows by 8
// lanes. A dot product takes four products an instruction (__dp4a). The queries that whole rows are compared with have 13
// bits and a sign: they are split into two vectors of 8 bits, q = 128 * high + low. All this is integers, so the order of
// adding does not matter. Everything that is a float is computed in the order of the specification, by instructions that
// the compiler does not fuse.

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define NO_KEY 0xFFFFFFFFFFFFFFFFull  // worse than any key
#define ALL 0xFFFFFFFFu               // the lanes of a warp
#define ROW_LANES 8                   // that read one row
#define UPPER_LANES 4                 // that read the upper half of one
#define QUERY_STEPS 8191.0f
#define COARSE_STEPS 127.0f
#define TINY 1e-12f

// Columns of the table that describes a tree, one line per level, top first. gpu.py writes it.
enum { ROWS, SCALES, UPPER, UPPER_SCALES, IDS, OFFSETS, MASK, TERM_OFFSETS, TERMS, BASES, STARTS, SLOTS, VALUES,
       START_BYTES, SLOT_BYTES, COLUMNS };

// Scores and ids in one number whose rising order is the order of results: higher scores first, then smaller ids.
__device__ u64 key_of(float score, i32 element) {
  i32 bits = __float_as_int(score);
  i32 ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return ((u64)((u32)~ordered ^ 0x80000000u) << 32) | (u32)element;
}

__device__ float score_of(u64 key) {
  i32 ordered = ~(i32)((u32)(key >> 32) ^ 0x80000000u);
  return __int_as_float(ordered ^ ((ordered >> 31) & 0x7FFFFFFF));
}

__device__ float combined(float cosine, float own, float best, float weight) {
  if (weight == 0.0f || !(best > 0.0f)) return cosine;
  return __fadd_rn(cosine, __fdiv_rn(__fmul_rn(weight, own), best));
}

// Bitonic sort of `size` keys, a power of two, by the whole block.
__device__ void sort_keys(u64* keys, i32 size) {
  for (i32 run = 2; run <= size; run *= 2)
    for (i32 stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (i32 i = threadIdx.x; i < size / 2; i += blockDim.x) {
        i32 low = 2 * i - (i & (stride - 1)), high = low + stride;
        u64 one = keys[low], other = keys[high];
        if ((one > other) == ((low & run) == 0)) keys[low] = other, keys[high] = one;
      }
    }
  __syncthreads();
}

__device__ i32 power_of_two(i32 least) {
  i32 size = 1;
  while (size < least) size *= 2;
  return size;
}

// One query's embeddings at one level, quantised, in shared memory: padded with zeros to pieces of 64 components.
struct Query {
  int4* high;  // [embeddings, 4 * pieces] 16 components each; for upper halves the whole query
  int4* low;
  float* scales;  // [embeddings]
  i32* shifts;    // [embeddings] what -120 of every component adds, for upper halves
  i32 embeddings, pieces;
};

// Quantise [embeddings, dimension] float32, by the whole block, one warp an embedding.
__device__ void quantise_query(Query query, const float* vectors, i32 dimension, bool coarse) {
  i32 lane = threadIdx.x & 31, warps = blockDim.x / 32;
  for (i32 m = threadIdx.x / 32; m < query.embeddings; m += warps) {
    const float* vector = vectors + (i64)m * dimension;
    float peak = 0.0f;
    for (i32 j = lane; j < dimension; j += 32) peak = fmaxf(peak, fabsf(vector[j]));
    for (i32 step = 16; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, step));
    float scale = peak > TINY ? __fdiv_rn(peak, coarse ? COARSE_STEPS : QUERY_STEPS) : 0.0f;
    u32* high = (u32*)(query.high + (i64)m * 4 * query.pieces);
    u32* low = (u32*)(query.low + (i64)m * 4 * query.pieces);
    i32 sum = 0;
    for (i32 word = lane; word < 16 * query.pieces; word += 32) {
      u32 highs = 0, lows = 0;
      for (i32 byte = 0; byte < 4; byte++) {
        i32 j = 4 * word + byte;
        i32 step = j < dimension && scale > 0.0f ? (i32)rintf(__fdiv_rn(vector[j], scale)) : 0;
        i32 upper = coarse ? step : (step + 64) >> 7;
        highs |= ((u32)upper & 0xFF) << (8 * byte);
        lows |= ((u32)(step - 128 * upper) & 0xFF) << (8 * byte);
        sum += step;
      }
      high[word] = highs, low[word] = lows;
    }
    for (i32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if (lane == 0) query.scales[m] = scale, query.shifts[m] = -120 * sum;
  }
}

__device__ i32 dots(int4 row, int4 query, i32 sum) {
  sum = __dp4a(row.x, query.x, sum);
  sum = __dp4a(row.y, query.y, sum);
  sum = __dp4a(row.z, query.z, sum);
  return __dp4a(row.w, query.w, sum);
}

__device__ int4 half_of(int4 both, i32 shift) {
  const u32 mask = 0x0F0F0F0Fu;
  int4 half;
  half.x = ((u32)both.x >> shift) & mask, half.y = ((u32)both.y >> shift) & mask;
  half.z = ((u32)both.z >> shift) & mask, half.w = ((u32)both.w >> shift) & mask;
  return half;
}

// The score of a row, by 8 lanes that all get it; a whole warp has to call this. Lanes without a row pass -1.
__device__ float score_row(Query query, const i8* rows, const float* scales, i64 row, i32 dimension) {
  i32 lane = threadIdx.x % ROW_LANES, words = dimension / 16;
  const i8* own = rows + (row < 0 ? 0 : row) * dimension;
  bool aligned = dimension % 16 == 0;  // else bytes are put together one by one
  float scale = row < 0 ? 0.0f : scales[row];
  float best = __int_as_float(0xFF800000);  // -inf
  for (i32 m = 0; m < query.embeddings; m++) {
    const int4 *high_query = query.high + m * 4 * query.pieces, *low_query = query.low + m * 4 * query.pieces;
    i32 high = 0, low = 0;
    if (row >= 0 && aligned)
      for (i32 word = lane; word < words; word += ROW_LANES) {
        int4 part = ((const int4*)own)[word];
        high = dots(part, high_query[word], high);
        low = dots(part, low_query[word], low);
      }
    if (row >= 0 && !aligned)
      for (i32 j = lane; j < dimension; j += ROW_LANES) {
        high += own[j] * ((const i8*)high_query)[j];
        low += own[j] * ((const i8*)low_query)[j];
      }
    i32 dot = 128 * high + low;
    for (i32 step = ROW_LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(ALL, dot, step);
    best = fmaxf(best, __fmul_rn(__fmul_rn(query.scales[m], scale), (float)dot));
  }
  return __fadd_rn(best, 0.0f);  // no negative zero
}

// The score of an entry by its upper half, by 4 lanes that all get it; a whole warp has to call this.
__device__ float score_upper(Query query, const u8* upper, const float* scales, i64 entry) {
  i32 lane = threadIdx.x % UPPER_LANES;
  const int4* own = (const int4*)upper + (entry < 0 ? 0 : entry) * 2 * query.pieces;
  float scale = entry < 0 ? 0.0f : scales[entry];
  float best = __int_as_float(0xFF800000);
  for (i32 m = 0; m < query.embeddings; m++) {
    const int4* given = query.high + m * 4 * query.pieces;
    i32 dot = 0;
    if (entry >= 0)
      for (i32 word = lane; word < 2 * query.pieces; word += UPPER_LANES) {
        int4 both = own[word];  // 32 components of piece word / 2: byte j holds those at j and at j + 32
        const int4* lower = given + word / 2 * 4 + word % 2;
        dot = dots(half_of(both, 0), lower[0], dot);
        dot = dots(half_of(both, 4), lower[2], dot);
      }
    for (i32 step = UPPER_LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(ALL, dot, step);
    dot = 16 * dot + query.shifts[m];
    best = fmaxf(best, __fmul_rn(__fmul_rn(query.scales[m], scale), (float)dot));
  }
  return __fadd_rn(best, 0.0f);
}

// Elements that were met, each with its first place: open addressing, `slots` a power of two, -1 = free.
struct Table {
  i32 *elements, *places;
  i32 slots;
};

__device__ void clear(Table table) {
  for (i32 i = threadIdx.x; i < table.slots; i += blockDim.x) table.elements[i] = -1, table.places[i] = 0x7FFFFFFF;
}

// Where an element stands, entered if it did not; `fresh` tells the one thread that entered it.
__device__ i32 enter(Table table, i32 element, bool* fresh) {
  i32 slot = (i32)(((u64)(u32)element * 2654435761ull >> 12) & (u32)(table.slots - 1));
  for (;;) {
    i32 before = atomicCAS(&table.elements[slot], -1, element);
    *fresh = before == -1;
    if (*fresh || before == element) return slot;
    slot = (slot + 1) & (table.slots - 1);
  }
}

__device__ i32 place_of(Table table, i32 element) {
  i32 slot = (i32)(((u64)(u32)element * 2654435761ull >> 12) & (u32)(table.slots - 1));
  while (table.elements[slot] != element) slot = (slot + 1) & (table.slots - 1);
  return table.places[slot];
}

// Where a term stands in terms[low:end], which rise; -1 where it does not.
__device__ i64 find(const i32* terms, i64 low, i64 end, i32 term) {
  while (low < end) {
    i64 middle = low + (end - low) / 2;
    if (terms[middle] < term) low = middle + 1; else end = middle;
  }
  return low;
}

__device__ u32 number_at(const void* numbers, i64 place, i32 bytes) {
  if (bytes == 1) return ((const u8*)numbers)[place];
  if (bytes == 2) return ((const u16*)numbers)[place];
  return ((const u32*)numbers)[place];
}

// Add the words' shares of all rows below one parent; a whole warp has to call this. A term's slots are all different,
// so its lanes never meet; terms come one after the other, since the order of adding counts.
__device__ void add_words(const i64* line, bool at_chunks, const float* norms, i32 parent, const i32* query_terms,
                          const float* weights, i32 terms, float* sums) {
  const i64 *children = (const i64*)line[OFFSETS], *bases = (const i64*)line[BASES];
  const i32 *ids = (const i32*)line[IDS], *known = (const i32*)line[TERMS];
  const u8* values = (const u8*)line[VALUES];
  i64 first = ((const i64*)line[TERM_OFFSETS])[parent], last = ((const i64*)line[TERM_OFFSETS])[parent + 1];
  i64 base = bases[parent], count = children[parent + 1] - children[parent], most = bases[parent + 1] - base;
  i32 lane = threadIdx.x & 31;
  for (i32 part = 0; part < terms; part += 32) {
    i64 start = 0, end = 0;
    if (part + lane < terms) {
      i64 place = find(known, first, last, query_terms[part + lane]);
      if (place < last && known[place] == query_terms[part + lane]) {
        start = (i32)number_at((const void*)line[STARTS], place, (i32)line[START_BYTES]);
        end = place + 1 < last ? (i32)number_at((const void*)line[STARTS], place + 1, (i32)line[START_BYTES]) : most;
        if (start < 0) start = 0;  // a damaged file, here and below
        if (end > most) end = most;
      }
    }
    for (i32 t = 0; t < 32 && part + t < terms; t++) {
      i64 from = __shfl_sync(ALL, start, t), to = __shfl_sync(ALL, end, t);
      for (i64 entry = base + from + lane; entry < base + to; entry += 32) {
        i64 slot = number_at((const void*)line[SLOTS], entry, (i32)line[SLOT_BYTES]);
        if (slot >= count) continue;
        float value = (float)values[entry];
        float share = at_chunks ? __fdiv_rn(value, __fadd_rn(value, norms[ids[children[parent] + slot]]))
                                : __fmul_rn(value, 1.0f / 255.0f);
        sums[slot] = __fadd_rn(sums[slot], __fmul_rn(weights[part + t], share));
      }
      __syncwarp();
    }
  }
}

__device__ float bm25(i32 chunk, const i64* offsets, const i32* terms, const void* counts, i32 bytes,
                      const float* norms, const i32* query_terms, const float* weights, i32 asked) {
  float total = 0.0f;
  for (i32 t = 0; t < asked; t++) {
    i64 place = find(terms, offsets[chunk], offsets[chunk + 1], query_terms[t]);
    if (place < offsets[chunk + 1] && terms[place] == query_terms[t]) {
      float count = (float)number_at(counts, place, bytes);
      total = __fadd_rn(total, __fmul_rn(weights[t], __fdiv_rn(count, __fadd_rn(count, norms[chunk]))));
    }
  }
  return total;
}

// What a walk keeps in shared memory; `_shared_bytes` in gpu.py counts it.
struct Shared {
  Query query;
  u64* keys;       // [sorted]
  float *cosines;  // [room] of every row below the frontier, then of the neighbours
  float *sums;     // [room]
  i32 *ids;        // [room] -1: masked, or met before
  i32 *owners;     // [room]
  Table table;
  i32 *frontier;  // [beam]
  i32 *base;      // [beam + 1] where each of the frontier's blocks begins among the rows below it
  i32 *counters;  // [5]
};
enum { WIDTH, KEPT, BEST, EXTRA, MET };

__device__ Shared lay_out(u8* memory, i32 embeddings, i32 pieces, i32 sorted, i32 room, i32 slots, i32 beam) {
  Shared s;
  s.query.high = (int4*)memory;
  s.query.low = s.query.high + embeddings * 4 * pieces;
  s.keys = (u64*)(s.query.low + embeddings * 4 * pieces);
  s.query.scales = (float*)(s.keys + sorted);
  s.query.shifts = (i32*)(s.query.scales + embeddings);
  s.query.embeddings = embeddings, s.query.pieces = pieces;
  s.cosines = (float*)(s.query.shifts + embeddings);
  s.sums = s.cosines + room;
  s.ids = (i32*)(s.sums + room);
  s.owners = s.ids + room;
  s.table.elements = s.owners + room, s.table.places = s.table.elements + slots, s.table.slots = slots;
  s.frontier = s.table.places + slots;
  s.base = s.frontier + beam;
  s.counters = s.base + beam + 1;
  return s;
}

// Raise counters[BEST] to the largest sum of the places `first` to `last` that are not left out.
__device__ void raise_best(Shared s, i32 first, i32 last) {
  i32 best = 0;  // of numbers from 0 the bits rise like the numbers
  for (i32 p = first + threadIdx.x; p < last; p += blockDim.x)
    if (s.ids[p] >= 0) best = max(best, __float_as_int(s.sums[p]));
  if (best > 0) atomicMax(&s.counters[BEST], best);
  __syncthreads();
}

__device__ u64 key_at(Shared s, i32 p, float weight) {
  return key_of(combined(s.cosines[p], s.sums[p], __int_as_float(s.counters[BEST]), weight), s.ids[p]);
}

// Sort the first `count` keys.
__device__ void sort_first(Shared s, i32 count) {
  i32 size = power_of_two(count);
  __syncthreads();
  for (i32 i = count + threadIdx.x; i < size; i += blockDim.x) s.keys[i] = NO_KEY;
  sort_keys(s.keys, size);
}

// Score the elements of the first `count` keys by their rows, and sort their keys anew; `places`: what stands in the keys.
__device__ void refine(Shared s, const i64* line, i32 count, bool places, i32 dimension, float weight) {
  i32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, each = 32 / ROW_LANES;
  for (i32 start = warp * each; start < count; start += warps * each) {
    i32 i = start + lane / ROW_LANES;
    i32 p = i >= count ? 0 : places ? (i32)s.keys[i] : place_of(s.table, (i32)(u32)s.keys[i]);
    i64 row = i < count ? s.ids[p] : -1;
    float score = score_row(s.query, (const i8*)line[ROWS], (const float*)line[SCALES], row, dimension);
    if (row >= 0 && lane % ROW_LANES == 0) s.cosines[p] = score;
    __syncwarp();
    if (row >= 0 && lane % ROW_LANES == 0) s.keys[i] = key_at(s, p, weight);
  }
  sort_first(s, count);
}

// reference.search for one query a block.
extern "C" __global__ void walk(
    const i64* levels, i32 depth, i32 pieces, i32 dimension, const float* queries, i32 batch, i32 embeddings, i32 beam,
    i32 k, i32 nodes_twice, i32 chunks_twice, i32 sorted, i32 room, i32 slots, i32 beside, const i64* ends,
    i32 documents, i64 chunks_in_all, const i64* query_offsets, const i32* query_terms, const float* query_weights,
    float weight, const i64* word_offsets, const i32* word_terms, const void* word_counts, i32 count_bytes,
    const float* norms, i32* nodes, float* node_scores, i32* chunks, float* scores, float* cosines, float* sums,
    i32* parents, float* best, i64* scored) {
  extern __shared__ int4 memory[];
  Shared s = lay_out((u8*)memory, embeddings, pieces, sorted, room, slots, beam);
  const float minus_infinity = __int_as_float(0xFF800000);
  i32 b = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  i32 terms = 0;
  if (query_offsets) {
    terms = (i32)(query_offsets[b + 1] - query_offsets[b]);
    query_terms += query_offsets[b], query_weights += query_offsets[b];
  }
  if (threadIdx.x == 0) s.counters[WIDTH] = 1, s.frontier[0] = 0;
  i64 met = 0;
  i32 total = 0, count = 0;
  for (i32 level = 0; level < depth; level++) {
    const i64* line = levels + level * COLUMNS;
    const i64* offsets = (const i64*)line[OFFSETS];
    const i32* ids = (const i32*)line[IDS];
    const u8* mask = (const u8*)line[MASK];
    bool at_chunks = level == depth - 1;
    const float* asked = queries + ((i64)level * batch + b) * embeddings * dimension;
    clear(s.table);
    __syncthreads();  // the frontier and its width are there
    i32 width = s.counters[WIDTH], twice = at_chunks ? chunks_twice : nodes_twice;
    // Sizes are read by as many threads, so that the block waits for memory once; then one thread adds them up.
    for (i32 f = threadIdx.x; f < width; f += blockDim.x)
      s.base[f + 1] = (i32)(offsets[s.frontier[f] + 1] - offsets[s.frontier[f]]);
    __syncthreads();
    if (threadIdx.x == 0) {
      s.base[0] = 0;
      for (i32 f = 0; f < width; f++) s.base[f + 1] += s.base[f];
      s.counters[KEPT] = s.counters[MET] = s.counters[BEST] = 0;
    }
    __syncthreads();
    total = s.base[width];
    bool coarse = total > twice;
    quantise_query(s.query, asked, dimension, coarse);
    for (i32 p = threadIdx.x; p < total; p += blockDim.x) s.sums[p] = 0.0f, s.cosines[p] = 0.0f;
    __syncthreads();
    for (i32 f = warp; f < width && terms > 0; f += warps)
      add_words(line, at_chunks, norms, s.frontier[f], query_terms, query_weights, terms, s.sums + s.base[f]);
    i32 each = 32 / UPPER_LANES, found = 0;
    for (i32 start = warp * each; start < total; start += warps * each) {
      i32 p = start + lane / UPPER_LANES;
      i64 entry = -1;
      if (p < total) {
        i32 f = 0;
        for (i32 step = power_of_two(width + 1) / 2; step > 0; step /= 2)
          if (f + step < width && s.base[f + step] <= p) f += step;
        entry = offsets[s.frontier[f]] + (p - s.base[f]);
        if (lane % UPPER_LANES == 0) {
          i32 element = ids[entry];
          bool allowed = !mask || mask[element], fresh;
          s.ids[p] = allowed ? element : -1;
          s.owners[p] = depth > 1 ? s.frontier[f] : -1;
          found += allowed;
          if (allowed) atomicMin(&s.table.places[enter(s.table, element, &fresh)], p);
        }
      }
      if (!coarse) continue;  // all lanes of the block alike
      float score = score_upper(s.query, (const u8*)line[UPPER], (const float*)line[UPPER_SCALES], entry);
      if (entry >= 0 && lane % UPPER_LANES == 0) s.cosines[p] = score;
    }
    if (found) atomicAdd(&s.counters[MET], found);
    __syncthreads();
    i32 kept = 0;
    for (i32 p = threadIdx.x; p < total; p += blockDim.x) {
      if (s.ids[p] >= 0 && place_of(s.table, s.ids[p]) != p) s.ids[p] = -1;
      kept += s.ids[p] >= 0;
    }
    if (kept) atomicAdd(&s.counters[KEPT], kept);
    __syncthreads();
    raise_best(s, 0, total);
    for (i32 p = threadIdx.x; p < total; p += blockDim.x) s.keys[p] = s.ids[p] < 0 ? NO_KEY : key_at(s, p, weight);
    sort_first(s, total);
    met += s.counters[MET];
    count = min(s.counters[KEPT], twice);
    if (coarse) quantise_query(s.query, asked, dimension, false);
    __syncthreads();
    refine(s, line, count, false, dimension, weight);
    if (at_chunks) break;
    width = min(count, beam);
    for (i32 i = threadIdx.x; i < beam; i += blockDim.x) {
      i64 place = ((i64)level * batch + b) * beam + i;
      bool there = i < width;
      if (there) s.frontier[i] = (i32)(u32)s.keys[i];
      nodes[place] = there ? s.frontier[i] : -1;
      node_scores[place] = there ? score_of(s.keys[i]) : minus_infinity;
    }
    if (threadIdx.x == 0) s.counters[WIDTH] = width;
  }
  if (beside > 0) {
    const i64* line = levels + (depth - 1) * COLUMNS;
    const u8* mask = (const u8*)line[MASK];
    i32 from = min(count, beam), pairs = 2 * beside + 1;
    // The table forgets what the second look left out, and remembers where the rest lies.
    for (i32 i = threadIdx.x; i < count; i += blockDim.x) s.keys[i] = place_of(s.table, (i32)(u32)s.keys[i]);
    __syncthreads();
    clear(s.table);
    if (threadIdx.x == 0) s.counters[EXTRA] = 0;
    __syncthreads();
    for (i32 i = threadIdx.x; i < count; i += blockDim.x) {
      bool fresh;
      s.table.places[enter(s.table, s.ids[(i32)s.keys[i]], &fresh)] = (i32)s.keys[i];
    }
    __syncthreads();
    for (i32 pair = threadIdx.x; pair < from * pairs; pair += blockDim.x) {
      i64 chunk = s.ids[(i32)s.keys[pair / pairs]], other = chunk + pair % pairs - beside;
      i32 low = 0, high = documents;  // the first document that ends behind the chunk
      while (low < high) {
        i32 middle = low + (high - low) / 2;
        if (ends[middle] <= chunk) low = middle + 1; else high = middle;
      }
      if (low == documents || other < (low ? ends[low - 1] : 0) || other < 0) continue;
      if (other >= ends[low] || other >= chunks_in_all || (mask && !mask[other])) continue;
      bool fresh;
      i32 slot = enter(s.table, (i32)other, &fresh);
      if (!fresh) continue;
      i32 extra = atomicAdd(&s.counters[EXTRA], 1), p = total + extra;
      s.table.places[slot] = p;
      s.ids[p] = (i32)other, s.owners[p] = -1;
      s.sums[p] = terms ? bm25((i32)other, word_offsets, word_terms, word_counts, count_bytes, norms, query_terms,
                               query_weights, terms)
                        : 0.0f;
    }
    __syncthreads();
    i32 extra = s.counters[EXTRA];
    for (i32 i = threadIdx.x; i < extra; i += blockDim.x) s.keys[count + i] = total + i;
    raise_best(s, total, total + extra);
    // All keys are places now. Rows that were scored before are scored again: they are few, and in the cache.
    refine(s, line, count + extra, true, dimension, weight);
    count += extra, met += extra;
  }
  for (i32 i = threadIdx.x; i < k; i += blockDim.x) {
    i64 place = (i64)b * k + i;
    bool there = i < count;
    i32 element = there ? (i32)(u32)s.keys[i] : -1, p = there ? place_of(s.table, element) : 0;
    chunks[place] = element;
    scores[place] = there ? score_of(s.keys[i]) : minus_infinity;
    cosines[place] = there ? s.cosines[p] : minus_infinity;
    sums[place] = there ? s.sums[p] : 0.0f;
    parents[place] = there ? s.owners[p] : -1;
  }
  if (threadIdx.x == 0) {
    best[b] = query_offsets ? __int_as_float(s.counters[BEST]) : 0.0f;
    scored[b] = met;
  }
}

// reference.exact: block (b, slice) keeps the best k keys of its slice of the rows, in keys[b, slice, k].
extern "C" __global__ void scan(const i64* line, i32 pieces, i32 dimension, i64 size, i64 slice, const float* queries,
                                i32 embeddings, i32 k, i32 sorted, u64* kept) {
  extern __shared__ int4 memory[];
  Shared s = lay_out((u8*)memory, embeddings, pieces, sorted, 0, 0, 0);
  i32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, each = 32 / ROW_LANES;
  const u8* mask = (const u8*)line[MASK];
  quantise_query(s.query, queries + (i64)blockIdx.x * embeddings * dimension, dimension, false);
  for (i32 i = threadIdx.x; i < sorted; i += blockDim.x) s.keys[i] = NO_KEY;
  __syncthreads();
  i64 first = blockIdx.y * slice, last = min(first + slice, size);
  i32 tile = sorted - k;
  for (i64 begin = first; begin < last; begin += tile) {
    u64 worst = s.keys[k - 1];
    i32 better = 0;
    __syncthreads();
    for (i32 start = warp * each; start < tile; start += warps * each) {
      i32 place = start + lane / ROW_LANES;
      i64 row = place < tile && begin + place < last && !(mask && !mask[begin + place]) ? begin + place : -1;
      float score = score_row(s.query, (const i8*)line[ROWS], (const float*)line[SCALES], row, dimension);
      if (lane % ROW_LANES == 0 && place < tile) {
        u64 key = row < 0 ? NO_KEY : key_of(score, (i32)row);
        s.keys[k + place] = key < worst ? key : NO_KEY;
        better |= key < worst;
      }
    }
    if (__syncthreads_or(better)) sort_keys(s.keys, sorted);
  }
  for (i32 i = threadIdx.x; i < k; i += blockDim.x)
    kept[((i64)blockIdx.x * gridDim.y + blockIdx.y) * k + i] = s.keys[i];
}

// reference.score_chunks: one block a query.
extern "C" __global__ void score(const i64* line, i32 pieces, i32 dimension, const float* queries, i32 embeddings,
                                 const i32* ids, i32 count, float* scores) {
  extern __shared__ int4 memory[];
  Shared s = lay_out((u8*)memory, embeddings, pieces, 0, 0, 0, 0);
  i32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, each = 32 / ROW_LANES;
  quantise_query(s.query, queries + (i64)blockIdx.x * embeddings * dimension, dimension, false);
  __syncthreads();
  const i32* own = ids + (i64)blockIdx.x * count;
  for (i32 start = warp * each; start < count; start += warps * each) {
    i32 i = start + lane / ROW_LANES;
    i64 row = i < count ? own[i] : -1;
    float found = score_row(s.query, (const i8*)line[ROWS], (const float*)line[SCALES], row, dimension);
    if (i < count && lane % ROW_LANES == 0)
      scores[(i64)blockIdx.x * count + i] = row < 0 ? __int_as_float(0xFF800000) : found;
  }
}

// reference.quantise: one warp a vector.
extern "C" __global__ void quantise(const float* vectors, i64 count, i32 dimension, i8* rows, float* scales) {
  i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (row >= count) return;
  i32 lane = threadIdx.x & 31;
  const float* vector = vectors + row * dimension;
  float peak = 0.0f;
  for (i32 j = lane; j < dimension; j += 32) peak = fmaxf(peak, fabsf(vector[j]));
  for (i32 step = 16; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, step));
  float scale = peak > TINY ? __fdiv_rn(peak, 127.0f) : 0.0f;
  for (i32 j = lane; j < dimension; j += 32)
    rows[row * dimension + j] = (i8)(scale > 0.0f ? rintf(__fdiv_rn(vector[j], scale)) : 0.0f);
  if (lane == 0) scales[row] = scale;
}
