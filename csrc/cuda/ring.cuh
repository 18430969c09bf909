// How a row moves through shared memory: the part of it that a block owns, and the order in which its tiles are loaded
// and used.
#pragma once
#include "async.cuh"
#include "row_args.h"
#include "vec.cuh"

namespace gk {

// A block's contiguous run of a row's tiles. The first block of the cluster also takes the scalar head and tail.
template <typename T> struct RowSlice {
  const T* logits;
  Cut<T> row;
  int first_vector, own_vectors;  // of this block
  int num_tiles;

  __device__ RowSlice(const T* logits, Cut<T> row, int vectors_per_tile, int rank, int cluster)
      : logits(logits), row(row) {
    const int all = (row.vectors + vectors_per_tile - 1) / vectors_per_tile, each = (all + cluster - 1) / cluster;
    first_vector = min_(rank * each * vectors_per_tile, row.vectors);
    own_vectors = min_(each * vectors_per_tile, row.vectors - first_vector);
    num_tiles = (own_vectors + vectors_per_tile - 1) / vectors_per_tile;
  }
  __device__ int column(int vector) const { return row.head + (first_vector + vector) * kPerVector<T>; }
};

// The order in which a row's tiles are loaded and, in the second sweep, used. Streamed tiles pass through the ring's
// slots; the last `kept` of them are still there when the second sweep starts. It begins with those, continues with the
// evicted tiles, reloaded in reverse order, and ends with the resident ones. A row that fits keeps every tile.
struct TileSchedule {
  int num_tiles, resident, kept;
  __device__ TileSchedule(int num_tiles, int slots, int resident_slots, bool two_pass) : num_tiles(num_tiles) {
    resident = two_pass ? min_(resident_slots, num_tiles) : 0;
    kept = two_pass ? min_(slots - resident_slots, num_tiles - resident) : num_tiles;
  }
  __device__ int num_streamed() const { return num_tiles - resident; }
  __device__ int num_reloads() const { return num_streamed() - kept; }
  __device__ bool evicted(int tile) const { return tile >= resident && tile < num_tiles - kept; }
  // For i < num_tiles + num_reloads().
  __device__ int load(int i) const { return i < num_tiles ? i : 2 * num_tiles - kept - 1 - i; }
  __device__ int second_pass_tile(int i) const {
    return i < kept ? num_tiles - kept + i : i < num_streamed() ? num_tiles - 1 - i : i - num_streamed();
  }
};

// The warp that loads and the warps that compute each have their own copy, and step through the same loads.
struct Ring {
  unsigned char* data;
  Mbarrier *full, *empty;
  int tile_bytes, resident, size;  // `resident` slots come first, then the ring's `size`
  int next = 0;                    // slot of the ring
  unsigned phases = 0;             // of each slot's barriers: one bit per slot, flipped by every load

  __device__ Ring(unsigned char* shared, int slots, int resident, int tile_bytes)
      : data(shared),
        full(reinterpret_cast<Mbarrier*>(shared + int64_t(slots) * tile_bytes)),
        empty(full + slots),
        tile_bytes(tile_bytes),
        resident(resident),
        size(slots - resident) {}

  __device__ void* control() const { return empty + resident + size; }
  __device__ unsigned char* at(int slot) const { return data + int64_t(slot) * tile_bytes; }
  __device__ int phase(int slot) const { return int(phases >> slot & 1u); }
  __device__ void flip(int slot) { phases ^= 1u << slot; }
  // The slot of the next tile in the schedule; advances `cursor`, a position in the ring, past a streamed one.
  __device__ int slot_of(int tile, const TileSchedule& schedule, int& cursor) const {
    if (tile < schedule.resident) return tile;
    const int slot = resident + cursor;
    cursor = cursor + 1 == size ? 0 : cursor + 1;
    return slot;
  }
  __device__ int behind(int cursor, int by) const { return (cursor + by) % size; }
};

}  // namespace gk
