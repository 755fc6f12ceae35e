/* A few threads that wait without spinning, so that a second busy program does not slow both down. */
#pragma once

/* One thread's share: called with every `thread` below `num_threads`. */
typedef void (*share_t)(void *work, int thread, int num_threads);

/* Runs the shares, on the calling thread alone when `num_threads` is 1 or the pool is busy with another call. */
void run_shares(share_t share, void *work, int num_threads);
