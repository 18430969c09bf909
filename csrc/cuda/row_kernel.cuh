// The row kernel. Each block or cluster works through rows. One warp loads a row's tiles into shared memory as slots
// become free, and goes straight on to the next row. The other warps sweep the tiles for the statistics, ask the
// epilogue for d loss / d logp and d loss / d entropy, and sweep the tiles again for the gradient: global memory is
// read once and written once.
#pragma once
#include "group.cuh"
#include "ring.cuh"
#include "row_output.cuh"

namespace gk {

template <typename T, bool kSoftcap, bool kCluster> class RowBlock {
 public:
  __device__ RowBlock(const RowArgs& args, unsigned char* shared)
      : args(args),
        two_pass(args.statistics && args.gradient.data),
        computing(int(blockDim.x) - kWarp),
        ring(shared, args.slots, args.resident, computing * kVectorsPerThread * kVectorBytes),
        control(static_cast<Control*>(ring.control())) {
    if constexpr (kCluster) rank = cluster_rank(), cluster = cluster_size();
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < args.slots; ++slot) {
        init_barrier(&ring.full[slot], args.bulk_copies ? 1 : kWarp);
        init_barrier(&ring.empty[slot], computing / kWarp);
      }
      for (Mbarrier& barrier : control->exchanged) init_barrier(&barrier, cluster);
      publish_barriers();
    }
    sync();
  }

  __device__ void run() {
    if (int(threadIdx.x) >= computing)
      load();
    else
      for_rows([this](int64_t row) { compute_row(row); });
    sync();  // nobody exits while another block may still write here
  }

 private:
  const RowArgs& args;
  const bool two_pass;
  const int computing;  // threads
  Ring ring;
  Control* const control;
  int rank = 0, cluster = 1;
  int exchanges = 0;

  __device__ void sync() const {
    if constexpr (kCluster)
      cluster_sync();
    else
      __syncthreads();
  }
  __device__ void sync_computing() const { sync_threads(1, computing); }

  template <typename Fn> __device__ __forceinline__ void for_rows(Fn fn) {
    for (int64_t row = blockIdx.x / cluster; row < args.rows; row += gridDim.x / cluster) fn(row);
  }
  __device__ RowSlice<T> slice_of(int64_t row) const {
    const int64_t offset = args.logits.offset(row, args.tokens);
    const Cut<T> cut(args.vocab, int((args.logits_past + offset) % kPerVector<T>));
    return RowSlice<T>(static_cast<const T*>(args.logits.data) + offset, cut, computing * kVectorsPerThread, rank,
                       cluster);
  }
  __device__ TileSchedule schedule_of(const RowSlice<T>& slice) const {
    return TileSchedule(slice.num_tiles, args.slots, args.resident, two_pass);
  }
  // False: the row is skipped, and its gradient is 0.
  __device__ bool row_active(int64_t row) const {
    const View& active = args.active;
    if (active.data && !static_cast<const uint8_t*>(active.data)[active.offset(row, args.tokens)]) return false;
    return args.statistics || args.g_logps[row] != 0 || (args.g_entropy && args.g_entropy[row] != 0);
  }

  // ---- the warp that loads ----

  // One lane issues all bulk copies. Other lanes would wait for the same barriers with nothing to keep them within one
  // phase, and a parity cannot tell older phases apart.
  __device__ void load() {
    if (!args.bulk_copies || lane_of_thread() == 0) {
      for_rows([this](int64_t row) { load_row(row); });
      for (int slot = 0; slot < args.slots; ++slot) wait_for_free(slot);
    }
    wait_for_own_copies();
    __syncwarp();
  }

  // The only wait of the block with a watchdog: if the other warps wait in vain, for a copy, each other or another
  // block, they do not release their slots. This warp waits for its slots after its last row too, for the same reason.
  __device__ void wait_for_free(int slot) {
    watch(&ring.empty[slot], ring.phase(slot) ^ 1, "row_kernel");
    wait(&ring.empty[slot], ring.phase(slot) ^ 1);
  }

  __device__ void load_row(int64_t row) {
    if (!row_active(row)) return;
    const RowSlice<T> slice = slice_of(row);
    const TileSchedule schedule = schedule_of(slice);
    const int loads = slice.num_tiles + (two_pass ? schedule.num_reloads() : 0);
    for (int i = 0; i < loads; ++i) {
      const int tile = schedule.load(i), slot = ring.slot_of(tile, schedule, ring.next);
      wait_for_free(slot);
      ring.flip(slot);
      load_tile(slice, tile, slot);
    }
  }

  __device__ void load_tile(const RowSlice<T>& slice, int tile, int slot) {
    const int first = tile * computing * kVectorsPerThread;
    const int bytes = min_(computing * kVectorsPerThread, slice.own_vectors - first) * kVectorBytes;
    const T* from = slice.logits + slice.column(first);
    unsigned char* to = ring.at(slot);
    if constexpr (kSm90)
      if (args.bulk_copies) {
        arrive_expecting(&ring.full[slot], bytes);
        bulk_copy(to, from, bytes, &ring.full[slot]);
        return;
      }
    const unsigned char* source = reinterpret_cast<const unsigned char*>(from);
    for (int at = lane_of_thread() * kVectorBytes; at < bytes; at += kWarp * kVectorBytes)
      async_copy16(to + at, source + at);
    arrive_when_copied(&ring.full[slot]);
  }

  // ---- the warps that compute ----

  struct ScalarTail {  // this thread's scalar of the row's head or tail
    int column;        // vocab: none
    float logit;
  };

  __device__ void release(int slot) {
    __syncwarp();
    if (lane_of_thread() == 0) arrive(&ring.empty[slot]);
    ring.flip(slot);
  }

  // Calls fn(column, vector) for this thread's vectors of a tile.
  template <typename Fn>
  __device__ __forceinline__ void for_vectors(const RowSlice<T>& slice, int tile, int slot, Fn fn) {
    wait(&ring.full[slot], ring.phase(slot));
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int in_tile = k * computing + int(threadIdx.x), vector = tile * computing * kVectorsPerThread + in_tile;
      if (vector < slice.own_vectors)
        fn(slice.column(vector), Vector<T>::unpack(load16(ring.at(slot) + in_tile * kVectorBytes)));
    }
  }

  __device__ void compute_row(int64_t row) {
    const RowSlice<T> slice = slice_of(row);
    const ScalarTail tail = scalar_tail_of(slice);
    if (!row_active(row)) {
      if (args.gradient.data) clear(row, slice, tail);
      if (args.statistics && is_writer()) store(row, {}, 0);
      return;
    }
    const TileSchedule schedule = schedule_of(slice);
    const Transform f = transform(row);
    const int64_t target = static_cast<const int64_t*>(args.targets.data)[args.targets.offset(row, args.tokens)];
    const bool legal = target >= 0 && target < args.vocab;
    const RowResult result =
        args.statistics ? statistics(row, slice, schedule, tail, f, legal ? int(target) : -1) : saved(row);
    if (args.gradient.data) write_gradient(row, slice, schedule, tail, f, result, legal ? int(target) : -1);
    ring.next = ring.behind(ring.next, schedule.num_streamed() + (two_pass ? schedule.num_reloads() : 0));
  }

  __device__ bool is_writer() const { return threadIdx.x == 0 && rank == 0; }

  __device__ ScalarTail scalar_tail_of(const RowSlice<T>& slice) const {
    const int column = rank == 0 ? slice.row.scalar_column(int(threadIdx.x)) : args.vocab;
    return {column, column < args.vocab ? to_float(slice.logits[column]) : 0.0f};
  }

  __device__ Transform transform(int64_t row) const {
    const View& given = args.temperature;
    const float inv_t =
        given.data ? 1 / static_cast<const float*>(given.data)[given.offset(row, args.tokens)] : args.inv_temperature;
    const float slope = args.logit_scale * inv_t, natural = kSoftcap ? inv_t : slope;
    return {natural, natural * float(kLog2e), slope, kSoftcap ? args.logit_scale / args.softcap : 1, args.softcap};
  }

  __device__ RowResult saved(int64_t row) const {
    const float d_entropy = args.g_entropy ? args.g_entropy[row] : 0;
    return {args.logps[row], args.entropy[row], args.max[row], args.log_sum[row], args.g_logps[row], d_entropy};
  }

  __device__ RowResult statistics(int64_t row, const RowSlice<T>& slice, const TileSchedule& schedule,
                                  const ScalarTail& tail, const Transform& f, int target) {
    // Read before the first barrier: afterwards another warp may overwrite it.
    const float of_target = target >= 0 ? to_float(slice.logits[target]) : NAN;
    const Softmax<float> own =
        args.sum_p2 ? first_sweep<true>(slice, schedule, tail, f) : first_sweep<false>(slice, schedule, tail, f);
    const Softmax<float> of_warp = lanes_merge(own, f.unit);
    if (lane_of_thread() == 0) control->of_warp[warp_of_thread()] = of_warp;
    sync_computing();
    if (warp_of_thread() == 0) {
      Softmax<float> total = merge_of(control->of_warp, computing / kWarp, f.unit);
      if constexpr (kCluster) total = cluster_merge(total, f.unit);
      finish(row, total, f, of_target);
    }
    sync_computing();
    return control->result;
  }

  template <bool kSquares>
  __device__ Softmax<float> first_sweep(const RowSlice<T>& slice, const TileSchedule& schedule, const ScalarTail& tail,
                                        const Transform& f) {
    Softmax<float> s;
    int cursor = ring.next;
    for (int tile = 0; tile < schedule.num_tiles; ++tile) {
      const int slot = ring.slot_of(tile, schedule, cursor);
      for_vectors(slice, tile, slot,
                  [&](int, const Vector<T>& v) { add_statistics<kSoftcap, kSquares>(s, v.values, f); });
      if (!two_pass || schedule.evicted(tile)) release(slot);
    }
    const float alone[1] = {tail.logit};
    if (tail.column < args.vocab) add_statistics<kSoftcap, kSquares>(s, alone, f);
    return s;
  }

  // Called by one warp: every block sends its statistics to every block, and all merge them in the order of their
  // ranks.
  __device__ Softmax<float> cluster_merge(const Softmax<float>& own, float unit) {
    const int parity = exchanges % 2, phase = exchanges / 2 % 2;
    ++exchanges;
    if (lane_of_thread() < cluster) {
      store_remote(&control->of_block[parity][rank], lane_of_thread(), own);
      arrive_remote(&control->exchanged[parity], lane_of_thread());
    }
    wait_cluster(&control->exchanged[parity], phase);
    return merge_of(control->of_block[parity], cluster, unit);
  }

  // Called by the same warp: the row's statistics, and the epilogue.
  __device__ void finish(int64_t row, Softmax<float> s, const Transform& f, float of_target) {
    if (s.max == -INFINITY) s.sum = NAN;  // every logit is -inf: no distribution
    const float log_sum = s.log_sum(), logp = (z_of<kSoftcap>(of_target, f) - s.max) * f.natural - log_sum;
    RowResult result{min_(logp, 0.0f), s.entropy(), s.max, log_sum, 0, 0};
    if (args.policy) policy_epilogue(row, result);
    if (threadIdx.x > 0) return;
    control->result = result;
    if (rank == 0) store(row, result, s.sum_p2());
  }

  __device__ void policy_epilogue(int64_t row, RowResult& result) const {
    const int64_t b = row / args.tokens, t = row % args.tokens;
    TokenInputs<float> in = read_token(args.in, b, t, result.logp);
    const Advantages made = args.in.form.advantages;
    if (made != Advantages::given)
      in.adv = sample_advantage(WarpTeam{}, args.in.advantages, made, b, args.in.group_size, args.advantage_eps);
    const Scalars<float> scalars = with_coefficients(args.scalars, args.in);
    const TokenResult<float> token = token_result(args.in.form, in, result.logp, 0.0f, {}, scalars);
    result.d_logp = token.d_logp, result.d_entropy = token.d_entropy;
  }

  __device__ void store(int64_t row, const RowResult& result, float sum_p2) const {
    args.logps[row] = result.logp;
    args.entropy[row] = result.entropy;
    args.max[row] = result.max;
    args.log_sum[row] = result.log_sum;
    if (args.sum_p2) args.sum_p2[row] = sum_p2;
  }

  // ---- the gradient ----

  __device__ Output<T> output(int64_t row, const RowSlice<T>& slice, int target, float of_target) const {
    const int64_t offset = args.gradient.offset(row, args.tokens);
    const bool wide = (args.gradient_past + offset + slice.row.head) % kPerVector<T> == 0;
    return {static_cast<T*>(args.gradient.data) + offset, wide, target, of_target};
  }

  __device__ void clear(int64_t row, const RowSlice<T>& slice, const ScalarTail& tail) const {
    const Output<T> out = output(row, slice, -1, 0);
    for (int v = int(threadIdx.x); v < slice.own_vectors; v += computing) out.write(slice.column(v), Vector<T>{});
    if (tail.column < args.vocab) out.row[tail.column] = from_float(0, T{});
  }

  __device__ void write_gradient(int64_t row, const RowSlice<T>& slice, const TileSchedule& schedule,
                                 const ScalarTail& tail, const Transform& f, const RowResult& r, int target) {
    const LogitGradient<float> g = LogitGradient<float>::of(r.d_logp, r.d_entropy, r.log_sum, r.entropy);
    const Slopes slopes{r.max, g.a * f.slope, g.b * f.slope};
    const Output<T> out =
        output(row, slice, target, f.slope * target_gradient(r.d_logp, r.d_entropy, r.logp, r.entropy));
    const auto sweep = [&](auto fn) { second_sweep(slice, schedule, tail, f, out, fn); };
    if (r.none()) {
      second_sweep(slice, schedule, tail, f, output(row, slice, -1, 0), [](auto& values) {
#pragma unroll
        for (float& value : values) value = 0;
      });
    } else if (slopes.b == 0) {
      sweep([&](auto& values) { to_gradient<kSoftcap, false>(values, f, slopes); });
    } else {
      sweep([&](auto& values) { to_gradient<kSoftcap, true>(values, f, slopes); });
    }
  }

  template <typename Fn>
  __device__ __forceinline__ void second_sweep(const RowSlice<T>& slice, const TileSchedule& schedule,
                                               const ScalarTail& tail, const Transform& f, const Output<T>& out,
                                               const Fn& fn) {
    int cursor = ring.behind(ring.next, schedule.num_streamed() - schedule.kept);
    for (int i = 0; i < schedule.num_tiles; ++i) {
      const int tile = schedule.second_pass_tile(i), slot = ring.slot_of(tile, schedule, cursor);
      for_vectors(slice, tile, slot, [&](int column, Vector<T> v) {
        replace<kSoftcap>(v.values, column, f, out, fn);
        out.write(column, v);
      });
      release(slot);
    }
    if (tail.column >= args.vocab) return;
    float alone[1] = {tail.logit};
    replace<kSoftcap>(alone, tail.column, f, out, fn);
    out.row[tail.column] = from_float(alone[0], T{});
  }
};

template <typename T, bool kSoftcap, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads + kWarp, 1) row_kernel(const __grid_constant__ RowArgs args) {
  if constexpr (kSm90 || !kCluster) RowBlock<T, kSoftcap, kCluster>(args, dynamic_shared()).run();
}

template <bool kCluster>
void launch_kernel(const RowArgs& args, DType dtype, Grid grid, Stream stream, const char* name) {
  const auto go = [&](auto softcap) {  // as many blocks as run at a time; they loop over the rows
    constexpr bool kSoftcap = decltype(softcap)::value;
    const auto kernel = dtype == DType::f32    ? row_kernel<float, kSoftcap, kCluster>
                        : dtype == DType::bf16 ? row_kernel<bf16, kSoftcap, kCluster>
                                               : row_kernel<f16, kSoftcap, kCluster>;
    grid.blocks = min_(args.rows, clusters_at_once(name, kernel, grid)) * grid.cluster;
    launch(name, kernel, grid, stream, args);
  };
  args.softcap > 0 ? go(std::true_type{}) : go(std::false_type{});
}

}  // namespace gk
