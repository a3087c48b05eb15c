/* Threads that compute one step together, and end with it.
 *
 * The work is cut into numbered pieces. A thread takes the next number that no other has taken, and
 * sleeps when none is left, until all threads are there. Starting a thread takes some 20
 * microseconds, so each step starts its own: between steps there is none that could hang at a fork
 * or at the end of the process, or take time from others.
 */

#ifndef CPU_THREADS_H
#define CPU_THREADS_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>

#define MAX_THREADS 256

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t all_wait;
    int64_t threads, waiting, round; /* threads that take part, that wait now; times all waited */
    int64_t next;                    /* the first number that no thread has taken */
} Team;

/* The next number, from 0 on. */
static inline int64_t take_number(Team *team) {
    return __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
}

/* Waits until all threads wait here; numbers begin at 0 again. All threads see what each of them
 * wrote before. */
static inline void wait_for_all(Team *team) {
    pthread_mutex_lock(&team->mutex);
    if (++team->waiting == team->threads) {
        team->waiting = team->next = 0;
        team->round++;
        pthread_cond_broadcast(&team->all_wait);
    } else {
        int64_t round = team->round;
        while (round == team->round) pthread_cond_wait(&team->all_wait, &team->mutex);
    }
    pthread_mutex_unlock(&team->mutex);
}

/* Starts a thread that receives no signals, which are for Python's own threads. Not 0 where the
 * system refuses it. */
static inline int start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof(faults) / sizeof(*faults); i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int refused = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return refused;
}

/* Calls run(argument i) for each of the `threads` arguments, which are `size` bytes apart: the
 * first in this thread, each other one in a thread of its own. Where the system refuses a thread,
 * those that there are do all the work. Returns how many there were, after all have ended. */
static inline int64_t run_team(Team *team, int64_t threads, void *(*run)(void *), void *arguments,
                               size_t size) {
    pthread_t others[MAX_THREADS];
    int64_t started = 1;
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    *team = (Team){.threads = threads};
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->all_wait, NULL);
    for (char *next = (char *)arguments + size; started < threads; started++, next += size)
        if (start_thread(others + started, run, next)) break;
    /* No thread has passed `wait_for_all` yet, where this one is missing. */
    pthread_mutex_lock(&team->mutex);
    team->threads = started;
    pthread_mutex_unlock(&team->mutex);
    run(arguments);
    for (int64_t i = 1; i < started; i++) pthread_join(others[i], NULL);
    pthread_cond_destroy(&team->all_wait);
    pthread_mutex_destroy(&team->mutex);
    return started;
}

#endif
