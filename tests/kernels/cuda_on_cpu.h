// Enough of CUDA to run walk.cu on a CPU, for tests: every thread of a block is a fiber that runs until it has to wait.
// What it finds are wrong results and waits that never end. Of races between threads of a block it finds some: threads
// take turns in an order that is drawn anew each time, and give way at some of their atomic operations. It says nothing
// about speed.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)

struct int4 { int x, y, z, w; };
struct Dimensions { unsigned x, y; };

namespace fibers {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
struct Barrier {
  unsigned arrived = 0, turn = 0;
};
inline std::vector<Fiber> all;
inline ucontext_t scheduler;
inline unsigned current;
inline Barrier block;
inline std::vector<Barrier> warps;
inline std::vector<unsigned long long> slots;
inline bool progress, any;
inline unsigned long long dice = 1;

inline unsigned drawn() { return (dice = dice * 6364136223846793005ull + 1442695040888963407ull) >> 33; }
inline void yield() { swapcontext(&all[current].context, &scheduler); }
inline void give_way();

inline void wait(Barrier& barrier, unsigned members) {
  progress = true;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    barrier.turn++;
    return;
  }
  for (unsigned turn = barrier.turn; barrier.turn == turn;) yield();
}
inline void wait_for_warp() { wait(warps[current / 32], 32); }
}  // namespace fibers

inline Dimensions threadIdx, blockIdx, blockDim, gridDim;
inline void fibers::give_way() {
  if (drawn() % 4) return;
  progress = true;
  yield();
  threadIdx.x = current;
}
inline int4 memory[1 << 16];  // shared by the threads of a block

inline void __syncthreads() { fibers::wait(fibers::block, fibers::all.size()), threadIdx.x = fibers::current; }
inline void __syncwarp() { fibers::wait_for_warp(), threadIdx.x = fibers::current; }
inline int __syncthreads_or(int value) {
  if (value) fibers::any = true;
  __syncthreads();
  int result = fibers::any;
  __syncthreads();
  fibers::any = false;
  __syncthreads();
  return result;
}
template <class T>
T exchanged(T value, unsigned from) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  fibers::slots[fibers::current] = bits;
  __syncwarp();
  bits = fibers::slots[fibers::current / 32 * 32 + from];
  __syncwarp();
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return exchanged(value, (fibers::current % 32) ^ lanes);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return exchanged(value, lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  int lane = fibers::current % 32;
  return exchanged(value, lane < lanes ? lane : lane - lanes);
}
template <class T>
T __ldg(const T* place) { return *place; }
inline void __threadfence_block() { fibers::give_way(); }

inline int atomicCAS(int* place, int expected, int value) {
  fibers::give_way();
  int before = *place;
  if (before == expected) *place = value;
  return before;
}
inline int atomicAdd(int* place, int value) {
  fibers::give_way();
  return std::exchange(*place, *place + value);
}
inline int atomicMin(int* place, int value) {
  fibers::give_way();
  return std::exchange(*place, value < *place ? value : *place);
}
inline int atomicMax(int* place, int value) {
  fibers::give_way();
  return std::exchange(*place, value > *place ? value : *place);
}
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }
inline int __float_as_int(float value) { int bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __int_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __dp4a(int a, int b, int sum) {
  for (int byte = 0; byte < 4; byte++) sum += (signed char)(a >> (8 * byte)) * (signed char)(b >> (8 * byte));
  return sum;
}

namespace fibers {
inline void* task;
inline void (*runner)(void*);
inline void begin() {
  runner(task);
  all[current].done = true;
  progress = true;
  for (;;) yield();
}

inline void run_block(unsigned threads, unsigned shared) {
  all.resize(threads), slots.assign(threads, 0), warps.assign((threads + 31) / 32, Barrier()), block = Barrier();
  std::memset(memory, 0xAB, sizeof(memory));  // nothing may count on what was there
  for (auto& fiber : all) {
    getcontext(&fiber.context);
    fiber.stack.resize(1 << 16);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    makecontext(&fiber.context, begin, 0);
  }
  for (unsigned left = threads; left > 0;) {
    progress = false;
    left = 0;
    unsigned first = drawn(), stride = drawn() | 1;  // odd: all threads have a turn, whose number is a power of two
    for (unsigned turn = 0; turn < threads; turn++) {
      current = (first + turn * stride) % threads;
      if (all[current].done) continue;
      left++;
      threadIdx.x = current;
      swapcontext(&scheduler, &all[current].context);
    }
    if (left && !progress) {
      std::fprintf(stderr, "threads wait for threads that never come\n");
      std::abort();
    }
  }
  for (std::size_t i = shared; i < sizeof(memory); i++)
    if (reinterpret_cast<unsigned char*>(memory)[i] != 0xAB) {
      std::fprintf(stderr, "shared memory is written behind its %u bytes\n", shared);
      std::abort();
    }
}
}  // namespace fibers

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
void launch(void (*kernel)(A...), unsigned x, unsigned y, unsigned threads, unsigned shared, void** arguments) {
  static void (*called)(A...);
  called = kernel;
  fibers::task = arguments;
  fibers::runner = [](void* given) { call(called, static_cast<void**>(given), std::index_sequence_for<A...>()); };
  gridDim = {x, y}, blockDim = {threads, 1};
  for (unsigned row = 0; row < y; row++)
    for (unsigned column = 0; column < x; column++) {
      blockIdx = {column, row};
      fibers::run_block(threads, shared);
    }
}
#define EXPORT(name)                                                                                        \
  extern "C" void run_##name(unsigned x, unsigned y, unsigned threads, unsigned shared, void** arguments) { \
    launch(name, x, y, threads, shared, arguments);                                                         \
  }
