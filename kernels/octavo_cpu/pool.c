#include "pool.h"

#include <pthread.h>
#include <unistd.h>

#define MAX_THREADS 256
#define STACK_BYTES (1 << 20)

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;   /* held by the caller whose work is being done */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;     /* guards what follows */
static pthread_cond_t work_is_there = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_is_done = PTHREAD_COND_INITIALIZER;
static int num_workers;
static pid_t owner; /* threads do not survive a fork */
static unsigned long round_number;
static int num_shares, num_unfinished;
static share_t current_share;
static void *current_work;

static void *worker(void *argument) {
    int thread = (int)(long)argument;
    unsigned long seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (round_number == seen || thread >= num_shares) {
            if (round_number != seen) seen = round_number;
            pthread_cond_wait(&work_is_there, &lock);
        }
        seen = round_number;
        share_t share = current_share;
        void *work = current_work;
        int total = num_shares;
        pthread_mutex_unlock(&lock);
        share(work, thread, total);
        pthread_mutex_lock(&lock);
        if (--num_unfinished == 0) pthread_cond_signal(&work_is_done);
    }
    return NULL;
}

/* Starts threads until there are `wanted` beside the caller; returns how many there are. Called with `lock` held. */
static int grow(int wanted) {
    if (owner != getpid()) {
        owner = getpid();
        num_workers = 0;
    }
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (num_workers < wanted) {
        pthread_t made;
        if (pthread_create(&made, &attributes, worker, (void *)(long)(num_workers + 1))) break;
        num_workers++;
    }
    pthread_attr_destroy(&attributes);
    return num_workers < wanted ? num_workers : wanted;
}

void run_shares(share_t share, void *work, int num_threads) {
    if (num_threads <= 1 || pthread_mutex_trylock(&in_use)) {
        share(work, 0, 1);
        return;
    }
    pthread_mutex_lock(&lock);
    num_shares = grow(num_threads - 1) + 1;
    num_unfinished = num_shares - 1;
    current_share = share;
    current_work = work;
    round_number++;
    int total = num_shares;
    pthread_cond_broadcast(&work_is_there);
    pthread_mutex_unlock(&lock);

    share(work, 0, total);

    pthread_mutex_lock(&lock);
    while (num_unfinished) pthread_cond_wait(&work_is_done, &lock);
    num_shares = 0;
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&in_use);
}
