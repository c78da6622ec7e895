// Which keys each token scores, and which tiles of 64 keys each CTA works on. All of it is read from device memory by the
// kernel, so that it may change between replays of a graph, and clamped, so that no content reaches foreign memory.
//
// A group is what shares one pass over the keys: up to `tile_tokens` tokens, of one sequence where keys are paged. Its tiles
// start at `first_key`.
//
//   dense   Tokens in order, tile_tokens to a group. A group's tiles cover the union of its tokens' ranges. Each CTA adds up
//           all groups' tiles and takes its even share, a run of them.
//   paged   The schedule, which another kernel has computed, says for each CTA at which sequence and tile it starts; it ends
//           where the next one starts. Sequences of more tokens than a group holds are passed over several times.
#pragma once

#include "mqa_logits_params.h"
#include "ptx_mbarrier.cuh"

namespace deep_gemm {

inline constexpr unsigned kAllLanes = 0xffffffffu;

struct KeyRange {
    int begin;
    int end;
};

struct MqaGroup {
    int num_tiles;    // 0 ends the walk
    int first_key;
    int first_token;
    int num_tokens;
    int table_row;    // paged only
};

__device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }

// ---- dense ----

__device__ __forceinline__ KeyRange dense_range(const MqaLogitsParams& params, int token) {
    const int begin = clamp(params.start.data[token * params.start.stride], 0, params.num_keys);
    int end = clamp(params.end.data[token * params.end.stride], begin, params.num_keys);
    if (params.compressed) end = min(end, begin + min(params.width, params.num_keys - begin));
    return {begin, end};
}

// The tiles that cover ranges whose union is `all`, the first one on a multiple of 16 keys so that stores are aligned.
__device__ __forceinline__ int first_key_of(KeyRange all) { return all.begin & ~15; }
__device__ __forceinline__ int tiles_of(KeyRange all) {
    return all.begin < all.end ? (all.end - first_key_of(all) + kMqaTileKeys - 1) / kMqaTileKeys : 0;
}

inline constexpr KeyRange kNoKeys = {0x7fffffff, 0};

__device__ __forceinline__ KeyRange join(KeyRange a, KeyRange b) {
    return b.begin < b.end ? KeyRange{min(a.begin, b.begin), max(a.end, b.end)} : a;
}

// A new group costs a CTA as long as three tiles: its queries, weights and ranges have to arrive. With 2, and less so with 4,
// most products of short prompts took longer on an H200: some CTAs have many short groups.
inline constexpr int kGroupCost = 3;

struct DensePosition {
    int group;
    int tile;  // of the group
};

// A CTA's run of tiles.
struct DenseWork {
    DensePosition begin;
    DensePosition end;
};

struct DenseWorkStorage {
    long long warp_sums[32];
    DenseWork work;
};

// This CTA's share: an even one of what all tiles and groups cost. Called by all threads.
template <int kThreads, int kTokens>
__device__ __forceinline__ void find_dense_work(const MqaLogitsParams& params, DenseWorkStorage& shared) {
    constexpr int kWarps = kThreads / 32;
    const int num_groups = (params.num_tokens + kTokens - 1) / kTokens;
    const int per_thread = (num_groups + kThreads - 1) / kThreads;
    const int first = min(static_cast<int>(threadIdx.x) * per_thread, num_groups);
    const int last = min(first + per_thread, num_groups);
    const auto cost = [&](int group) {
        KeyRange all = kNoKeys;
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int token = group * kTokens + i;
            if (token < params.num_tokens) all = join(all, dense_range(params, token));
        }
        const int tiles = tiles_of(all);
        return tiles > 0 ? tiles + kGroupCost : 0;
    };
    long long sum = 0;
#pragma unroll 1
    for (int group = first; group < last; ++group) sum += cost(group);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long until = sum;  // of this warp, up to and with this thread
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const long long other = __shfl_up_sync(kAllLanes, until, offset);
        if (lane >= offset) until += other;
    }
    if (lane == 31) shared.warp_sums[warp] = until;
    if (threadIdx.x == 0) shared.work = {{num_groups, 0}, {num_groups, 0}};
    __syncthreads();
    long long before = until - sum, total = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i < warp) before += shared.warp_sums[i];
        total += shared.warp_sums[i];
    }
    const long long begin = total * blockIdx.x / gridDim.x;
    const long long end = total * (blockIdx.x + 1) / gridDim.x;
    const auto is_mine = [&](long long at) { return before <= at && at < before + sum; };
    if (is_mine(begin) || is_mine(end)) {
        const auto find = [&](long long at, int group, long long before_group, int group_cost, DensePosition& position) {
            if (before_group <= at && at < before_group + group_cost) {
                position = {group, static_cast<int>(max(at - before_group - kGroupCost, 0ll))};
            }
        };
        long long before_group = before;
#pragma unroll 1
        for (int group = first; group < last; ++group) {
            const int group_cost = cost(group);
            find(begin, group, before_group, group_cost, shared.work.begin);
            find(end, group, before_group, group_cost, shared.work.end);
            before_group += group_cost;
        }
    }
    __syncthreads();
}

// Walks a CTA's groups; all lanes of a warp together. `range` is that of the group's token `lane`. `begin` is called with a
// group's first token and their number before their ranges are known, also where it turns out to have no tiles: what else
// is read of these tokens need not wait for the ranges.
template <int kTokens>
class DenseWalk {
public:
    __device__ __forceinline__ DenseWalk(const MqaLogitsParams& params, const DenseWork& work)
        : params_(params), at_(work.begin), end_(work.end) {}

    template <class Begin>
    __device__ __forceinline__ bool next(MqaGroup& group, KeyRange& range, Begin&& begin) {
        const int lane = threadIdx.x % 32;
        while (at_.group < end_.group || (at_.group == end_.group && at_.tile < end_.tile)) {
            const int first_token = at_.group * kTokens;
            group.num_tokens = min(kTokens, params_.num_tokens - first_token);
            begin(first_token, group.num_tokens);
            range = {0, 0};
            if (lane < group.num_tokens) range = dense_range(params_, first_token + lane);
            const KeyRange mine = join(kNoKeys, range);
            const KeyRange all = {__reduce_min_sync(kAllLanes, mine.begin), __reduce_max_sync(kAllLanes, mine.end)};
            const int tiles = tiles_of(all);
            group.num_tiles = (at_.group == end_.group ? min(tiles, end_.tile) : tiles) - at_.tile;
            group.first_key = first_key_of(all) + at_.tile * kMqaTileKeys;
            group.first_token = first_token;
            group.table_row = 0;
            ++at_.group;
            at_.tile = 0;
            if (group.num_tiles > 0) return true;
        }
        return false;
    }

private:
    const MqaLogitsParams& params_;
    DensePosition at_;
    DensePosition end_;
};

// ---- paged ----

// Tokens of one sequence that are next to one another.
struct PagedAtom {
    int first_token;
    int num_tokens;
    int table_row;
};

// The atom at `index`: a sequence, or, with `indices`, the token that it starts with. All lanes together.
__device__ __forceinline__ PagedAtom paged_atom(const MqaLogitsParams& params, int index) {
    if (params.indices.data == nullptr) return {index * params.next_n, params.next_n, index};
    const int lane = threadIdx.x % 32;
    const int token = min(index + lane % kMqaAtomTokens, params.num_tokens - 1);
    const int sequence = params.indices.data[token * params.indices.stride];
    const int first = __shfl_sync(kAllLanes, sequence, 0);
    const bool same = sequence == first && index + lane % kMqaAtomTokens < params.num_tokens;
    const unsigned others = ~__ballot_sync(kAllLanes, same) & ((1u << kMqaAtomTokens) - 1);
    return {index, others == 0 ? kMqaAtomTokens : __ffs(others) - 1, first};
}

// Keys [0, length) of a token. Where a sequence has one length its last token sees all keys, each one before it one less:
// `clean` sets what a token does not see to -inf, without it these logits are left as they come.
__device__ __forceinline__ int paged_length(const MqaLogitsParams& params, int sequence, int in_sequence) {
    const int32_t* lens = params.context_lens.data + sequence * params.context_lens.stride;
    if (params.lens_per_token) return clamp(lens[in_sequence * params.context_lens.inner_stride], 0, params.max_length);
    const int length = max(*lens, 0);
    return clamp(params.clean ? length - (params.next_n - 1 - in_sequence) : length, 0, params.max_length);
}

// The same, 0 where the sequence of the token has no row in the block table. `sequence`: of the token, in the lengths; with
// `indices` these name no sequences, but tokens.
__device__ __forceinline__ KeyRange paged_range(const MqaLogitsParams& params, int token, int sequence) {
    if (params.indices.data != nullptr) {
        const int row = params.indices.data[token * params.indices.stride];
        if (row < 0 || row >= params.table_rows) return {0, 0};
    }
    return {0, paged_length(params, sequence, token - sequence * params.next_n)};
}

// What the schedule says of a CTA: at which tile of which atom it begins, and where the next one does.
struct PagedShare {
    int index;
    int tile;
    int last_index;
    int last_tile;
};

__device__ __forceinline__ PagedShare paged_share(const MqaLogitsParams& params) {
    const int32_t* entry = params.schedule + 2 * blockIdx.x;
    return {entry[0], entry[1], entry[2], entry[3]};
}

// The same for paged keys.
template <int kTokens>
class PagedWalk {
public:
    __device__ __forceinline__ PagedWalk(const MqaLogitsParams& params, const PagedShare& share) : params_(params) {
        const int num_atoms = params.num_atoms;
        index_ = clamp(share.index, 0, num_atoms);
        tile_ = max(share.tile, 0);
        last_index_ = clamp(share.last_index, 0, num_atoms);
        last_tile_ = max(share.last_tile, 0);
        load();
    }

    template <class Begin>
    __device__ __forceinline__ bool next(MqaGroup& group, KeyRange& range, Begin&& begin) {
        const int lane = threadIdx.x % 32;
        while (index_ < last_index_ || (index_ == last_index_ && tile_ < last_tile_ && index_ < params_.num_atoms)) {
            if (done_tokens_ >= atom_.num_tokens) {
                index_ += params_.indices.data != nullptr ? atom_.num_tokens : 1;
                tile_ = 0;
                load();
                continue;
            }
            group.first_token = atom_.first_token + done_tokens_;
            group.num_tokens = min(kTokens, atom_.num_tokens - done_tokens_);
            done_tokens_ += group.num_tokens;
            begin(group.first_token, group.num_tokens);
            range = {0, 0};
            if (lane < group.num_tokens) {
                const int token = group.first_token + lane;
                range = paged_range(params_, token, params_.indices.data != nullptr ? token : atom_.table_row);
            }
            const int length = __reduce_max_sync(kAllLanes, range.end);
            int tiles = (length + kMqaTileKeys - 1) / kMqaTileKeys;
            if (index_ == last_index_) tiles = min(tiles, last_tile_);
            group.num_tiles = tiles - tile_;
            if (group.num_tiles <= 0) continue;
            group.first_key = tile_ * kMqaTileKeys;
            group.table_row = atom_.table_row;
            return true;
        }
        return false;
    }

private:
    __device__ __forceinline__ void load() {
        done_tokens_ = 0;
        if (index_ < params_.num_atoms) atom_ = paged_atom(params_, index_);
    }

    const MqaLogitsParams& params_;
    int index_, tile_, last_index_, last_tile_;
    PagedAtom atom_ = {0, 0, 0};
    int done_tokens_ = 0;
};

}  // namespace deep_gemm
