/* Small programs for a benchmark guest: work NAME [SCALE], or work list.
 *
 * Each prints "@@R name digest". A digest depends on the program and the scale only, never on the machine, so that a
 * guest's lines can be compared with the host's. Scale is a percentage of the usual amount of work. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t mix(uint64_t digest, uint64_t value)
{
	digest ^= value + 0x9e3779b97f4a7c15u + (digest << 6) + (digest >> 2);
	return digest * 0xff51afd7ed558ccdu;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t sieve(int n)
{
	enum { LIMIT = 1 << 16 };
	static unsigned char composite[LIMIT];
	uint64_t found = 0;
	for (int round = 0; round < n; round++) {
		memset(composite, 0, sizeof composite);
		for (int i = 2; i < LIMIT; i++) {
			if (composite[i])
				continue;
			found += i ^ round;
			for (int j = 2 * i; j < LIMIT; j += i)
				composite[j] = 1;
		}
	}
	return found;
}

static uint64_t hash(int n)
{
	uint64_t digest = 1;
	for (int i = 0; i < n * 10000; i++)
		digest = mix(digest, i);
	return digest;
}

static uint64_t fibonacci(uint64_t n)
{
	return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static uint64_t fib(int n)
{
	uint64_t sum = 0;
	for (int i = 0; i < n; i++)
		sum += fibonacci(20 + i % 3);
	return sum;
}

/* Additions and multiplications in order: the same bits on every IEEE machine. */
static uint64_t matmul(int n)
{
	enum { SIDE = 48 };
	static double a[SIDE][SIDE], b[SIDE][SIDE], c[SIDE][SIDE];
	uint64_t digest = 0;
	for (int i = 0; i < SIDE * SIDE; i++) {
		a[i / SIDE][i % SIDE] = 1.0 / (i + 1);
		b[i / SIDE][i % SIDE] = i % 17 - 8.0;
	}
	for (int round = 0; round < n; round++) {
		for (int i = 0; i < SIDE; i++)
			for (int j = 0; j < SIDE; j++) {
				double sum = round;
				for (int k = 0; k < SIDE; k++)
					sum += a[i][k] * b[k][j];
				c[i][j] = sum;
			}
		uint64_t bits;
		memcpy(&bits, &c[round % SIDE][(round * 7) % SIDE], sizeof bits);
		digest = mix(digest, bits);
	}
	return digest;
}

static uint64_t getppid_calls(int n)
{
	uint64_t same = 0;
	long parent = syscall(SYS_getppid);
	for (int i = 0; i < n * 500; i++)
		same += syscall(SYS_getppid) == parent;
	return same;
}

static uint64_t pipe_turns(int n)
{
	int there[2], back[2];
	uint64_t digest = 0;
	if (pipe(there) || pipe(back))
		fail("pipe");
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	int turns = n * 20;
	for (int i = 0; i < turns; i++) {
		int value = i;
		if (child == 0) {
			if (read(there[0], &value, sizeof value) != sizeof value)
				_exit(1);
			value = value * 3 + 1;
			if (write(back[1], &value, sizeof value) != sizeof value)
				_exit(1);
		} else {
			if (write(there[1], &value, sizeof value) != sizeof value)
				fail("write");
			if (read(back[0], &value, sizeof value) != sizeof value)
				fail("read");
			digest = mix(digest, value);
		}
	}
	if (child == 0)
		_exit(0);
	int status;
	waitpid(child, &status, 0);
	return mix(digest, status);
}

static uint64_t fork_and_wait(int n)
{
	uint64_t digest = 0;
	for (int i = 0; i < n; i++) {
		pid_t child = fork();
		if (child < 0)
			fail("fork");
		if (child == 0)
			_exit(i & 0x7f);
		int status;
		waitpid(child, &status, 0);
		digest = mix(digest, WEXITSTATUS(status));
	}
	return digest;
}

static uint64_t map_and_touch(int n)
{
	uint64_t digest = 0;
	for (int i = 0; i < n; i++) {
		size_t pages = 1 + i % 31;
		unsigned char *at = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED)
			fail("mmap");
		for (size_t page = 0; page < pages; page++)
			at[page * 4096 + i % 4096] = (unsigned char)(page + i);
		if (mprotect(at, 4096, PROT_READ))
			fail("mprotect");
		digest = mix(digest, at[(pages - 1) * 4096 + i % 4096]);
		munmap(at, pages * 4096);
	}
	return digest;
}

static volatile sig_atomic_t caught;

static void on_signal(int number)
{
	caught += number == SIGUSR1;
}

static uint64_t signals(int n)
{
	struct sigaction action = { .sa_handler = on_signal };
	caught = 0;
	sigaction(SIGUSR1, &action, NULL);
	for (int i = 0; i < n * 50; i++)
		raise(SIGUSR1);
	return caught;
}

static const struct {
	const char *name;
	uint64_t (*run)(int);
	int usual;
} programs[] = {
	{ "sieve", sieve, 20 },          { "hash", hash, 100 },       { "fib", fib, 60 },
	{ "matmul", matmul, 20 },        { "getppid", getppid_calls, 20 }, { "pipe", pipe_turns, 20 },
	{ "fork", fork_and_wait, 20 },   { "mmap", map_and_touch, 200 },   { "signal", signals, 20 },
};

int main(int count, char **words)
{
	const char *name = count > 1 ? words[1] : "list";
	int scale = count > 2 ? atoi(words[2]) : 100;
	for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
		if (!strcmp(name, "list")) {
			puts(programs[i].name);
		} else if (!strcmp(name, "all") || !strcmp(name, programs[i].name)) {
			int n = programs[i].usual * scale / 100;
			printf("@@R %s %016llx\n", programs[i].name, (unsigned long long)programs[i].run(n > 0 ? n : 1));
			fflush(stdout);
		}
	}
	return 0;
}
