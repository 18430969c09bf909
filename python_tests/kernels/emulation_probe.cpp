// Kernels that do what a GPU leaves undefined, or just not yet, for test_emulation.py: the emulator must tell them
// apart.
#include <string>

#include "cuda/async.cuh"
#include "cuda/vec.cuh"
#include "emulation/emulator.cpp"

namespace gk {
namespace {

constexpr int kThreads = 64, kSharedBytes = 4096;

// In shared memory: a barrier, and room behind it.
Mbarrier* barrier() { return reinterpret_cast<Mbarrier*>(dynamic_shared()); }
unsigned char* room() { return dynamic_shared() + 16; }
alignas(16) unsigned char global_memory[1 << 12];

void make_barrier(int arrivals, bool publish = true) {
  if (threadIdx.x == 0) {
    init_barrier(barrier(), arrivals);
    if (publish) publish_barriers();
  }
  cluster_sync();
}
int warp() { return int(threadIdx.x) / kWarp; }
int lane() { return int(threadIdx.x) % kWarp; }

// ---- 16 bytes ----

void load_at(int offset) { load16(room() + offset); }
void store_at(int offset) { store16(room() + offset, {}); }
void stream_at(int offset) { store_streaming(global_memory + offset, {}); }

// ---- bar.sync ----

void whole_warps() { sync_threads(1, kThreads); }
void one_warp() {
  if (warp() == 1) sync_threads(1, kWarp);
}
void half_of_each_warp() {
  if (lane() < kWarp / 2) sync_threads(1, kWarp);
}
void no_whole_warps() {
  if (threadIdx.x < 48) sync_threads(1, 48);
}
void two_numbers() { sync_threads(1, warp() == 0 ? 3 * kWarp : kThreads); }
void no_such_barrier() { sync_threads(16, kThreads); }

// ---- barriers in shared memory ----

void arrivals(int each) {
  make_barrier(kThreads);
  for (int i = 0; i < each; ++i) {
    arrive(barrier());
    wait(barrier(), i % 2);
  }
}
void an_arrival_before_the_bytes() {
  make_barrier(1);
  if (threadIdx.x > 0) return;
  arrive_expecting(barrier(), 16);
  arrive(barrier());
}
void not_initialised() { arrive(barrier()); }
void not_published() {
  make_barrier(1, false);
  if (threadIdx.x == 0) arrive_remote(barrier(), 1 - cluster_rank());
}
void copies(int count, int bytes_each, bool publish, bool wait_for_them) {
  make_barrier(1, publish);
  if (threadIdx.x > 0) return;
  arrive_expecting(barrier(), count * bytes_each);
  for (int i = 0; i < count && i < 16; ++i) bulk_copy(room() + i * bytes_each, global_memory, bytes_each, barrier());
  if (wait_for_them) wait(barrier(), 0);
}
void own_copies(bool wait_for_them) {
  for (int i = 0; i < 4; ++i) async_copy16(room() + 16 * (4 * threadIdx.x + i) % 2048, global_memory);
  if (wait_for_them) wait_for_own_copies();
}

// ---- clusters ----

void tell(int rank) { *at_rank(room(), rank) = 1; }
void meet_behind_an_access() {
  if (threadIdx.x == 0) tell(1 - cluster_rank());
  cluster_sync();
}
void leave_behind_an_access() {
  make_barrier(1);
  if (threadIdx.x == 0) {
    tell(1 - cluster_rank());
    arrive_remote(barrier(), 1 - cluster_rank());
  }
  wait_cluster(barrier(), 0);
}
// What tells the first block that the other has ended is no barrier of theirs, but the machine's own means.
void tell_one_that_has_ended() {
  static int gone;
  if (threadIdx.x == 0 && cluster_rank() == 0) gone = 0;
  cluster_sync();
  if (cluster_rank() == 1) {
    ++gone;
    emulation::wake(&gone);
    return;
  }
  emulation::wait(&gone, [] { return gone == kThreads; });
  tell(1);
}
void tell_nobody() { at_rank(room(), 2); }

struct Case {
  const char* name;
  std::function<void()> kernel;
  unsigned blocks = 1;  // one cluster
  unsigned threads = kThreads;
  int shared_bytes = kSharedBytes;
};

const Case kCases[] = {
    {"fine: load16", [] { load_at(16); }},
    {"load16", [] { load_at(8); }},
    {"fine: store16", [] { store_at(0); }},
    {"store16", [] { store_at(4); }},
    {"fine: store_streaming", [] { stream_at(32); }},
    {"store_streaming", [] { stream_at(2); }},
    {"fine: whole warps", whole_warps},
    {"fine: one warp", one_warp},
    {"half of each warp", half_of_each_warp},
    {"no whole warps", no_whole_warps},
    {"two numbers of threads", two_numbers},
    {"barrier 16", no_such_barrier},
    {"fine: arrivals", [] { arrivals(3); }},
    {"an arrival before the bytes", an_arrival_before_the_bytes},
    {"no arrivals", [] { make_barrier(0); }},
    {"not initialised", not_initialised},
    {"not published", not_published, 2},
    {"fine: copies", [] { copies(4, 64, true, true); }},
    {"copies to a barrier that is not published", [] { copies(4, 64, false, true); }},
    {"copies not waited for", [] { copies(4, 64, true, false); }},
    {"copies of no bytes", [] { copies(1, 0, true, true); }},
    {"copies too large for the barrier", [] { copies(1 << 16, 16, true, true); }},
    {"fine: own copies", [] { own_copies(true); }},
    {"own copies not waited for", [] { own_copies(false); }},
    {"fine: meet behind an access", meet_behind_an_access, 2},
    {"leave behind an access", leave_behind_an_access, 2},
    {"tell one that has ended", tell_one_that_has_ended, 2},
    {"tell nobody", tell_nobody, 2},
    {"fine: all of the shared memory", [] {}, 1, kThreads, 8192},
    {"more shared memory", [] {}, 1, kThreads, 8193},
    {"fine: 1024 threads", [] {}, 1, 1024},
    {"1025 threads", [] {}, 1, 1025},
    {"fine: 8 blocks", [] {}, 8},
    {"9 blocks", [] {}, 9},
};

}  // namespace
}  // namespace gk

extern "C" int count() { return int(std::size(gk::kCases)); }
extern "C" const char* name_of(int i) { return gk::kCases[i].name; }

// What the machine says of a case; nothing where it is fine.
extern "C" const char* run(int i, int schedule) {
  static std::string error;
  const gk::Case& one = gk::kCases[i];
  gk::emulation::machine() = {1, 64, 8192, true, gk::emulation::Schedule(schedule)};
  try {
    gk::emulation::run_grid("probe", {one.blocks}, {one.threads}, size_t(one.shared_bytes), one.blocks, one.kernel);
    error.clear();
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
