# A mail server with its tables in Consul: OpenSMTPD with table-consul, table-procexec and table-consulctl.
#
#     docker build -t table-consul .
#
# To reach Debian through a mirror or a proxy, configure apt with --secret id=apt.conf,src=FILE, which no layer
# contains. Files that it names can be secrets too: id=apt.sources and id=ca-certificates are in /run/secrets.

# Debian's stable release; its OpenSMTPD is 7.6. For 7.9: --build-arg BASE=docker.io/library/debian:forky-slim
# --build-arg OPENSMTPD='7.9.*'
ARG BASE=docker.io/library/debian:trixie-20261005-slim

FROM ${BASE} AS build
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/99build,mode=0444 \
    --mount=type=secret,id=apt.sources,mode=0444 --mount=type=secret,id=ca-certificates,mode=0444 \
    apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
        debhelper dh-python pybuild-plugin-pyproject python3-all python3-click python3-hatchling python3-msgspec
WORKDIR /build/table-consul
COPY . .
# Files keep their dates in the package, and Python's compiled files contain them.
RUN find . -exec touch --no-dereference --date="$(dpkg-parsechangelog --show-field Date)" {} + \
    && dpkg-buildpackage --build=binary --no-sign --ignore-builtin-builddeps \
    && mkdir /package && mv ../table-consul_*_all.deb /package/table-consul.deb

FROM ${BASE}
ARG BASE
# The release is pinned; Debian's security updates to it are not.
ARG OPENSMTPD=7.6.0p1-*
# More Debian packages, such as opensmtpd-filter-rspamd; python3-crypt-r and python3-argon2 for the service auth.
ARG PACKAGES=
# Volumes outlive images, so the ids of the owners of their files must not change. Without the dates in shadow(5) the
# same packages give the same image on any day.
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/99build,mode=0444 \
    --mount=type=secret,id=apt.sources,mode=0444 --mount=type=secret,id=ca-certificates,mode=0444 \
    --mount=type=bind,from=build,source=/package,target=/run/package \
    for each in opensmtpd:525 opensmtpq:526; do \
        groupadd --system --gid "${each#*:}" "${each%:*}" \
        && useradd --system --uid "${each#*:}" --gid "${each#*:}" --no-create-home \
            --home-dir /var/lib/opensmtpd/empty --shell /usr/sbin/nologin "${each%:*}" || exit 1; \
    done \
    && groupadd --gid 5000 vmail \
    && useradd --uid 5000 --gid 5000 --no-create-home --home-dir /var/vmail --shell /usr/sbin/nologin vmail \
    && apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
        "opensmtpd=$OPENSMTPD" /run/package/table-consul.deb python3-prometheus-client python3-re2 $PACKAGES \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/lib/dpkg/*-old /var/log/apt \
        /var/log/*.log /var/cache/ldconfig/aux-cache /etc/aliases /etc/group- /etc/gshadow- /etc/passwd- \
        /etc/shadow- /usr/lib/python3.*/pydoc_data /usr/lib/python3.*/test /usr/share/bash-completion \
        /usr/share/info /usr/share/lintian \
    && sed -i 's/^\([^:]*:[^:]*\):[0-9]*:/\1::/' /etc/shadow \
    && ln -sf mail/smtpd.conf /etc/smtpd.conf \
    && ln -sf ../run/mailname /etc/mailname \
    && install -d -m 0711 /var/spool/smtpd \
    && install -d -m 0750 -o vmail -g vmail /var/vmail
COPY --chmod=0755 contrib/container/entrypoint contrib/container/healthcheck /usr/local/sbin/
COPY --chmod=0644 contrib/container/smtpd.conf contrib/container/table-consul.toml /etc/mail/

ARG VERSION=
LABEL org.opencontainers.image.title="table-consul" \
    org.opencontainers.image.description="OpenSMTPD with its tables in Consul's key-value store" \
    org.opencontainers.image.licenses="ISC" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.base.name="${BASE}"
EXPOSE 25
# The queue, delivered mail, and the on-disk snapshots.
VOLUME ["/var/spool/smtpd", "/var/vmail", "/var/lib/table-consul"]
# smtpd must start as root: it binds port 25 and switches to the users of its processes and deliveries.
USER root
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s --retries=3 CMD ["/usr/local/sbin/healthcheck"]
ENTRYPOINT ["/usr/local/sbin/entrypoint"]
