// The kernels for NVIDIA GPUs; reference.py says what they compute, and they give the same bits.
//
// A whole walk is one launch, and one query is one block: it goes through all levels without a second launch and
// without a word to other blocks, since what a level needs of the level above is its frontier, which fits into shared
// memory. A block mostly waits for memory, so several share a multiprocessor, each with few registers and little shared
// memory, and each asks for all that a step needs before it looks at any of it.
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
#define PIECES_AT_ONCE 4              // of 16 bytes that a lane asks for before it looks at one
#define THREADS 256                   // of a block, at most
#define BLOCKS 4                      // for which a multiprocessor has the registers
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

__device__ i32 sum_of_warp(i32 value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(ALL, value);
#else
  for (i32 step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
#endif
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

// Sort `count` keys, none of them twice; room for a power of two of them has to be there.
__device__ void sort_first(u64* keys, i32 count) {
  __syncthreads();
  if (count <= blockDim.x) {  // a key's place is the number of smaller ones
    i32 i = threadIdx.x, place = 0;
    u64 own = i < count ? keys[i] : NO_KEY;
    for (i32 other = 0; other < count && i < count; other++) place += keys[other] < own;
    __syncthreads();
    if (i < count) keys[place] = own;
    __syncthreads();
    return;
  }
  i32 size = power_of_two(count);
  for (i32 i = count + threadIdx.x; i < size; i += blockDim.x) keys[i] = NO_KEY;
  sort_keys(keys, size);
}

// One query's embeddings at one level, quantised, in shared memory: padded with zeros to pieces of 64 components.
struct Query {
  int4* high;  // [embeddings, 4 * pieces] 16 components each; for upper halves the whole query
  int4* low;   // null for upper halves
  float* scales;  // [embeddings]
  i32* shifts;    // [embeddings] what -120 of every component adds, for upper halves; null for whole rows
  i32 embeddings, pieces;
};

// Quantise one of [embeddings, dimension] float32, by one warp.
__device__ void quantise_query(Query query, const float* vectors, i32 m, i32 dimension) {
  i32 lane = threadIdx.x & 31;
  const float* vector = vectors + (i64)m * dimension;
  bool coarse = !query.low;
  float peak = 0.0f;
  for (i32 j = lane; j < dimension; j += 32) peak = fmaxf(peak, fabsf(__ldg(vector + j)));
  for (i32 step = 16; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, step));
  float scale = peak > TINY ? __fdiv_rn(peak, coarse ? COARSE_STEPS : QUERY_STEPS) : 0.0f;
  u32* high = (u32*)(query.high + (i64)m * 4 * query.pieces);
  u32* low = coarse ? high : (u32*)(query.low + (i64)m * 4 * query.pieces);
  i32 sum = 0;
  for (i32 word = lane; word < 16 * query.pieces; word += 32) {
    u32 highs = 0, lows = 0;
    for (i32 byte = 0; byte < 4; byte++) {
      i32 j = 4 * word + byte;
      i32 step = j < dimension && scale > 0.0f ? (i32)rintf(__fdiv_rn(__ldg(vector + j), scale)) : 0;
      i32 upper = coarse ? step : (step + 64) >> 7;
      highs |= ((u32)upper & 0xFF) << (8 * byte);
      lows |= ((u32)(step - 128 * upper) & 0xFF) << (8 * byte);
      sum += step;
    }
    if (!coarse) low[word] = lows;
    high[word] = highs;
  }
  sum = sum_of_warp(sum);
  if (lane == 0) query.scales[m] = scale;
  if (lane == 0 && coarse) query.shifts[m] = -120 * sum;
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
  i32 lane = threadIdx.x % ROW_LANES, words = row < 0 ? 0 : dimension / 16;
  const i8* own = rows + (row < 0 ? 0 : row) * dimension;
  bool aligned = dimension % 16 == 0;  // else bytes are put together one by one
  float scale = row < 0 ? 0.0f : __ldg(scales + row);
  float best = __int_as_float(0xFF800000);  // -inf
  for (i32 m = 0; m < query.embeddings; m++) {
    const int4 *high_query = query.high + m * 4 * query.pieces, *low_query = query.low + m * 4 * query.pieces;
    i32 high = 0, low = 0;
    for (i32 first = lane; first < words && aligned; first += PIECES_AT_ONCE * ROW_LANES) {
      int4 parts[PIECES_AT_ONCE];
#pragma unroll
      for (i32 i = 0; i < PIECES_AT_ONCE; i++)
        if (first + i * ROW_LANES < words) parts[i] = __ldg((const int4*)own + first + i * ROW_LANES);
#pragma unroll
      for (i32 i = 0; i < PIECES_AT_ONCE; i++)
        if (first + i * ROW_LANES < words) {
          high = dots(parts[i], high_query[first + i * ROW_LANES], high);
          low = dots(parts[i], low_query[first + i * ROW_LANES], low);
        }
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
  i32 lane = threadIdx.x % UPPER_LANES, words = entry < 0 ? 0 : 2 * query.pieces;
  const int4* own = (const int4*)upper + (entry < 0 ? 0 : entry) * 2 * query.pieces;
  float scale = entry < 0 ? 0.0f : __ldg(scales + entry);
  float best = __int_as_float(0xFF800000);
  for (i32 m = 0; m < query.embeddings; m++) {
    const int4* given = query.high + m * 4 * query.pieces;
    i32 dot = 0;
    for (i32 first = lane; first < words; first += PIECES_AT_ONCE * UPPER_LANES) {
      int4 parts[PIECES_AT_ONCE];
#pragma unroll
      for (i32 i = 0; i < PIECES_AT_ONCE; i++)
        if (first + i * UPPER_LANES < words) parts[i] = __ldg(own + first + i * UPPER_LANES);
#pragma unroll
      for (i32 i = 0; i < PIECES_AT_ONCE; i++) {
        i32 word = first + i * UPPER_LANES;  // 32 components of piece word / 2: byte j holds those at j and at j + 32
        const int4* lower = given + word / 2 * 4 + word % 2;
        if (word < words) {
          dot = dots(half_of(parts[i], 0), lower[0], dot);
          dot = dots(half_of(parts[i], 4), lower[2], dot);
        }
      }
    }
    for (i32 step = UPPER_LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(ALL, dot, step);
    dot = 16 * dot + query.shifts[m];
    best = fmaxf(best, __fmul_rn(__fmul_rn(query.scales[m], scale), (float)dot));
  }
  return __fadd_rn(best, 0.0f);
}

// The places of elements that were met, each element once: open addressing, `slots` a power of two, -1 = free. Which
// element stands at a place is in `ids`.
struct Table {
  i32* places;
  i32 slots;
};

__device__ void clear(Table table) {
  for (i32 i = threadIdx.x; i < table.slots; i += blockDim.x) table.places[i] = -1;
}

__device__ i32 slot_of(Table table, i32 element) {
  return (i32)(((u64)(u32)element * 2654435761ull >> 12) & (u32)(table.slots - 1));
}

// Enter the element that stands at place `p`, unless it was entered; returns its slot, or -1 where this call entered it.
__device__ i32 enter(Table table, volatile i32* ids, i32 p) {
  i32 element = ids[p];
  __threadfence_block();  // whoever sees the place sees its element
  for (i32 slot = slot_of(table, element);; slot = (slot + 1) & (table.slots - 1)) {
    i32 before = atomicCAS(&table.places[slot], -1, p);
    if (before == -1) return -1;
    if (ids[before] == element) return slot;
  }
}

__device__ i32 place_of(Table table, const i32* ids, i32 element) {
  i32 slot = slot_of(table, element);
  while (ids[table.places[slot]] != element) slot = (slot + 1) & (table.slots - 1);
  return table.places[slot];
}

// Where a term stands in terms[low:end], which rise, or would stand.
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
  Query query;     // for whole rows
  Query coarse;    // for upper halves
  u64* keys;       // [sorted] of what was chosen
  i64* firsts;     // [beam] what a place below each of the frontier's nodes is added to, to be the number of its entry
  i32* places;     // [sorted] of what was chosen
  float *cosines;  // [room] of every entry below the frontier, then of the neighbours
  float *sums;     // [room]
  i32 *ids;        // [room] -1: masked, or met before
  i32 *owners;     // [room] whose child, as a place in the frontier; -1: a neighbour
  Table table;
  i32 *frontier;  // [beam]
  i32 *base;      // [beam + 1] where each of the frontier's blocks begins among the entries below it
  i32 *counters;  // [COUNTS + ROUNDS]
};
enum { WIDTH, KEPT, BEST, EXTRA, MET, CHOSEN, COUNTS };
#define ROUNDS 3  // counters from COUNTS on: of a round, of the round before, and the next one's, which is set to 0

// Without a beam what the second look needs alone.
__device__ Shared lay_out(u8* memory, i32 embeddings, i32 pieces, i32 sorted, i32 room, i32 slots, i32 beam) {
  Shared s;
  s.query.high = (int4*)memory;
  s.query.low = s.query.high + embeddings * 4 * pieces;
  s.coarse.high = s.query.low + embeddings * 4 * pieces;
  s.coarse.low = nullptr;
  s.keys = (u64*)(s.coarse.high + (beam ? embeddings * 4 * pieces : 0));
  s.firsts = (i64*)(s.keys + sorted);
  s.query.scales = (float*)(s.firsts + beam);
  s.query.shifts = nullptr;
  s.coarse.scales = s.query.scales + embeddings;
  s.coarse.shifts = (i32*)(s.coarse.scales + embeddings);
  s.query.embeddings = s.coarse.embeddings = embeddings, s.query.pieces = s.coarse.pieces = pieces;
  s.places = s.coarse.shifts + embeddings;
  s.cosines = (float*)(s.places + (beam ? sorted : 0));
  s.sums = s.cosines + room;
  s.ids = (i32*)(s.sums + room);
  s.owners = s.ids + room;
  s.table.places = s.owners + room, s.table.slots = slots;
  s.frontier = s.table.places + slots;
  s.base = s.frontier + beam;
  s.counters = s.base + beam + 1;
  return s;
}

// Begin a level: where the entries below the frontier are, and the query. Returns how many there are.
__device__ i32 begin_level(Shared s, const i64* offsets, const float* asked, i32 dimension) {
  i32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, width = s.counters[WIDTH];
  clear(s.table);
  for (i32 f = threadIdx.x; f < width; f += blockDim.x) {
    const i64* own = offsets + s.frontier[f];
    s.firsts[f] = __ldg(own);
    s.base[f + 1] = (i32)(__ldg(own + 1) - s.firsts[f]);
  }
  for (i32 task = warps - 1 - warp; task < 2 * s.query.embeddings; task += warps)
    quantise_query(task % 2 ? s.query : s.coarse, asked, task / 2, dimension);
  __syncthreads();
  if (warp == 0) {
    i32 before = 0;
    for (i32 part = 0; part < width; part += 32) {
      i32 f = part + lane, size = f < width ? s.base[f + 1] : 0, upto = size;
      for (i32 step = 1; step < 32; step *= 2) {
        i32 other = __shfl_up_sync(ALL, upto, step);
        if (lane >= step) upto += other;
      }
      if (f < width) s.firsts[f] -= before + upto - size, s.base[f + 1] = before + upto;
      before += __shfl_sync(ALL, upto, 31);
    }
    if (lane == 0) s.base[0] = 0;
    for (i32 i = KEPT + lane; i < COUNTS + ROUNDS; i += 32) s.counters[i] = 0;
  }
  __syncthreads();
  return s.base[width];
}

// Whose children the places are, and which elements stand there.
__device__ void fill(Shared s, const i32* ids, const u8* mask, i32 total) {
  i32 width = s.counters[WIDTH], half = power_of_two(width + 1) / 2, met = 0;
#pragma unroll 4
  for (i32 p = threadIdx.x; p < total; p += blockDim.x) {
    i32 f = 0;
    for (i32 step = half; step > 0; step /= 2)
      if (f + step < width && s.base[f + step] <= p) f += step;
    i32 element = __ldg(ids + s.firsts[f] + p);
    s.owners[p] = f, s.ids[p] = element, s.sums[p] = 0.0f;
  }
  __syncthreads();  // an element that is entered is compared with others
  for (i32 p = threadIdx.x; p < total; p += blockDim.x) {
    if (mask && !__ldg(mask + s.ids[p])) {
      s.ids[p] = -1;
      continue;
    }
    i32 slot = enter(s.table, s.ids, p);
    if (slot >= 0) atomicMin(&s.table.places[slot], p);
    met++;
  }
  met = sum_of_warp(met);
  if (threadIdx.x % 32 == 0) atomicAdd(&s.counters[MET], met);
  __syncthreads();
}

// Leave out what was met before.
__device__ void drop_doubles(Shared s, i32 total) {
  i32 kept = 0;
  for (i32 p = threadIdx.x; p < total; p += blockDim.x) {
    if (s.ids[p] >= 0 && place_of(s.table, s.ids, s.ids[p]) != p) s.ids[p] = -1;
    kept += s.ids[p] >= 0;
  }
  kept = sum_of_warp(kept);
  if (threadIdx.x % 32 == 0) atomicAdd(&s.counters[KEPT], kept);
  __syncthreads();
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
  if (s.ids[p] < 0) return NO_KEY;
  return key_of(combined(s.cosines[p], s.sums[p], __int_as_float(s.counters[BEST]), weight), s.ids[p]);
}

__device__ u64 key_kept(Shared s, i32 p) { return (u64)(u32)__float_as_int(s.cosines[p]) << 32 | (u32)s.ids[p]; }

// Choose the `wanted` best places, or all that are not left out where these are no more. Cosines are lost.
__device__ void choose(Shared s, i32 total, i32 wanted, float weight) {
  bool all = s.counters[KEPT] <= wanted;
  u64 bound = NO_KEY - 1;
  if (!all) {
    // A key's upper half takes the place of the cosine; its lower half is the element.
    for (i32 p = threadIdx.x; p < total; p += blockDim.x)
      s.cosines[p] = __int_as_float((i32)(key_at(s, p, weight) >> 32));
    // A bound that exactly `wanted` keys do not exceed; what a thread counts are its own places.
    u64 least = 0;
    for (i32 round = 0; least < bound; round = (round + 1) % ROUNDS) {
      u64 middle = least + (bound - least) / 2;
      i32 count = 0;
      for (i32 p = threadIdx.x; p < total; p += blockDim.x)
        count += key_kept(s, p) <= middle;
      count = sum_of_warp(count);
      if (threadIdx.x % 32 == 0 && count) atomicAdd(&s.counters[COUNTS + round], count);
      if (threadIdx.x == 0) s.counters[COUNTS + (round + 1) % ROUNDS] = 0;
      __syncthreads();
      count = s.counters[COUNTS + round];
      if (count >= wanted) bound = middle; else least = middle + 1;
      if (count == wanted) break;
    }
  }
  for (i32 p = threadIdx.x; p < total; p += blockDim.x)
    if (s.ids[p] >= 0 && (all || key_kept(s, p) <= bound)) s.places[atomicAdd(&s.counters[CHOSEN], 1)] = p;
  __syncthreads();
}

// Score the chosen elements from the first on by their rows.
__device__ void score_chosen(Shared s, const i64* line, i32 first, i32 count, i32 dimension) {
  i32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, each = 32 / ROW_LANES;
  for (i32 start = first + warp * each; start < count; start += warps * each) {
    i32 i = start + lane / ROW_LANES, p = i < count ? s.places[i] : -1;
    i64 row = p < 0 ? -1 : s.ids[p];
    float score = score_row(s.query, (const i8*)line[ROWS], (const float*)line[SCALES], row, dimension);
    if (p >= 0 && lane % ROW_LANES == 0) s.cosines[p] = score;
  }
  __syncthreads();
}

// Sort the keys of the chosen elements.
__device__ void sort_chosen(Shared s, i32 count, float weight) {
  for (i32 i = threadIdx.x; i < count; i += blockDim.x) s.keys[i] = key_at(s, s.places[i], weight);
  sort_first(s.keys, count);
}

// reference.search for one query a block.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) walk(
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
  __syncthreads();
  i64 met = 0;
  i32 total = 0, count = 0;
  for (i32 level = 0; level < depth; level++) {
    const i64* line = levels + level * COLUMNS;
    bool at_chunks = level == depth - 1;
    total = begin_level(s, (const i64*)line[OFFSETS], queries + ((i64)level * batch + b) * embeddings * dimension,
                        dimension);
    i32 width = s.counters[WIDTH], twice = at_chunks ? chunks_twice : nodes_twice;
    fill(s, (const i32*)line[IDS], (const u8*)line[MASK], total);
    for (i32 f = warp; f < width && terms > 0; f += warps)
      add_words(line, at_chunks, norms, s.frontier[f], query_terms, query_weights, terms, s.sums + s.base[f]);
    i32 each = 32 / UPPER_LANES;
    for (i32 start = warp * each; start < total && total > twice; start += warps * each) {
      i32 p = start + lane / UPPER_LANES;
      i64 entry = p < total ? s.firsts[s.owners[p]] + p : -1;
      float score = score_upper(s.coarse, (const u8*)line[UPPER], (const float*)line[UPPER_SCALES], entry);
      if (entry >= 0 && lane % UPPER_LANES == 0) s.cosines[p] = score;
    }
    drop_doubles(s, total);
    if (terms > 0) raise_best(s, 0, total);
    choose(s, total, twice, weight);
    met += s.counters[MET];
    count = s.counters[CHOSEN];
    score_chosen(s, line, 0, count, dimension);
    sort_chosen(s, count, weight);
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
    __syncthreads();
  }
  if (beside > 0) {
    const i64* line = levels + (depth - 1) * COLUMNS;
    const u8* mask = (const u8*)line[MASK];
    i32 from = min(count, beam), pairs = 2 * beside + 1;
    clear(s.table);  // what the second look left out may come back
    __syncthreads();
    for (i32 i = threadIdx.x; i < count; i += blockDim.x) enter(s.table, s.ids, s.places[i]);
    __syncthreads();
    i32 p = -1;  // a place that this thread may use
    for (i32 pair = threadIdx.x; pair < from * pairs; pair += blockDim.x) {
      i64 chunk = (i32)(u32)s.keys[pair / pairs], other = chunk + pair % pairs - beside;
      i32 low = 0, high = documents;  // the first document that ends behind the chunk
      while (low < high) {
        i32 middle = low + (high - low) / 2;
        if (ends[middle] <= chunk) low = middle + 1; else high = middle;
      }
      if (low == documents || other < (low ? ends[low - 1] : 0) || other < 0 || other == chunk) continue;
      if (other >= ends[low] || other >= chunks_in_all || (mask && !mask[other])) continue;
      if (p < 0) p = total + atomicAdd(&s.counters[EXTRA], 1);
      s.ids[p] = (i32)other, s.owners[p] = -1;
      if (enter(s.table, s.ids, p) >= 0) {
        s.ids[p] = -1;
        continue;
      }
      s.places[atomicAdd(&s.counters[CHOSEN], 1)] = p;
      s.sums[p] = terms ? bm25((i32)other, word_offsets, word_terms, word_counts, count_bytes, norms, query_terms,
                               query_weights, terms)
                        : 0.0f;
      p = -1;
    }
    __syncthreads();
    i32 extra = s.counters[CHOSEN] - count;
    if (terms > 0) raise_best(s, total, total + s.counters[EXTRA]);
    score_chosen(s, line, count, count + extra, dimension);
    count += extra, met += extra;
    sort_chosen(s, count, weight);
  }
  for (i32 i = threadIdx.x; i < k; i += blockDim.x) {
    i64 place = (i64)b * k + i;
    bool there = i < count;
    i32 element = there ? (i32)(u32)s.keys[i] : -1, p = there ? place_of(s.table, s.ids, element) : 0;
    chunks[place] = element;
    scores[place] = there ? score_of(s.keys[i]) : minus_infinity;
    cosines[place] = there ? s.cosines[p] : minus_infinity;
    sums[place] = there ? s.sums[p] : 0.0f;
    parents[place] = there && depth > 1 && s.owners[p] >= 0 ? s.frontier[s.owners[p]] : -1;
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
  for (i32 m = warp; m < embeddings; m += warps)
    quantise_query(s.query, queries + (i64)blockIdx.x * embeddings * dimension, m, dimension);
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
  for (i32 m = warp; m < embeddings; m += warps)
    quantise_query(s.query, queries + (i64)blockIdx.x * embeddings * dimension, m, dimension);
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
