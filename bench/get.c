/*
 * A minimal backend that reads Consul for each request: one GET over one kept connection. Assumes that keys need no
 * escaping and that every response is valid.
 *
 *   get HOST PORT PREFIX      the key is read from PREFIX/KEY
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

static signed char digit[256];

static size_t
base64(char *out, const char *p)
{
	unsigned bits = 0, have = 0;
	char *begin = out;

	for (; digit[(unsigned char)*p] >= 0; p++) {
		bits = bits << 6 | (unsigned)digit[(unsigned char)*p];
		if ((have += 6) >= 8)
			*out++ = bits >> (have -= 8);
	}
	return out - begin;
}

int
main(int argc, char **argv)
{
	static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	static const char ready[] = "register|alias\nregister|ready\n";
	static char in[65536], out[65536], http[65536];
	struct sockaddr_in at = {.sin_family = AF_INET};
	size_t len = 0;
	int fd, on = 1;
	ssize_t n;

	if (argc != 4 || inet_pton(AF_INET, argv[1], &at.sin_addr) != 1)
		errx(1, "usage: get HOST PORT PREFIX");
	at.sin_port = htons(atoi(argv[2]));
	memset(digit, -1, sizeof digit);
	for (int i = 0; i < 64; i++)
		digit[(unsigned char)letters[i]] = i;
	if ((fd = socket(AF_INET, SOCK_STREAM, 0)) < 0 || connect(fd, (struct sockaddr *)&at, sizeof at) < 0)
		err(1, "%s:%s", argv[1], argv[2]);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	while ((n = read(0, in + len, sizeof in - len)) > 0) {
		char *line = in, *eol;

		len += n;
		for (; (eol = memchr(line, '\n', in + len - line)) != NULL; line = eol + 1) {
			char *field[8] = {line}, *body, *value, *length;
			size_t got = 0;
			int request, written;

			*eol = 0;
			if (strcmp(line, "config|ready") == 0 && write(1, ready, sizeof ready - 1) < 0)
				return 1;
			if (*line != 't')
				continue;
			for (int i = 1; i < 8; i++) {
				if ((field[i] = strchr(field[i - 1], '|')) == NULL)
					errx(1, "bad request");
				*field[i]++ = 0;
			}
			request = snprintf(http, sizeof http, "GET /v1/kv/%s/%s HTTP/1.1\r\nHost: %s:%s\r\n\r\n", argv[3], field[7],
			    argv[1], argv[2]);
			if (write(fd, http, request) != request)
				err(1, "write");
			for (;;) {
				if ((n = read(fd, http + got, sizeof http - 1 - got)) <= 0)
					err(1, "read");
				http[got += n] = 0;
				if ((body = strstr(http, "\r\n\r\n")) == NULL)
					continue;
				length = strcasestr(http, "content-length:");
				body += 4;
				if (got >= (size_t)(body - http) + (length && length < body ? strtoul(length + 15, NULL, 10) : 0))
					break;
			}
			written = sprintf(out, "%s-result|%s|", field[4], field[6]);
			if (strncmp(http, "HTTP/1.1 200", 12) == 0 && (value = strstr(body, "\"Value\":\"")) != NULL) {
				written += sprintf(out + written, "found|");
				written += base64(out + written, value + 9);
				out[written++] = '\n';
			} else if (strncmp(http, "HTTP/1.1 404", 12) == 0)
				written += sprintf(out + written, "not-found\n");
			else
				written += sprintf(out + written, "error|Consul\n");
			if (write(1, out, written) != written)
				return 1;
		}
		len -= line - in;
		memmove(in, line, len);
	}
	return 0;
}
