"""``limosa ca``: the certificate authority, and certificates for hosts and people."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

from limosa.cli.arguments import Commands, add_command, add_noun
from limosa.cli.output import say, say_json, say_table
from limosa.client.route import configuration_folders
from limosa.errors import InvalidInput


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``ca`` and its verbs."""
    verbs = add_noun(commands, "ca", "certificates for hosts and people")
    init = add_command(
        verbs,
        "init",
        "make a certificate authority",
        _init,
        examples=["ca init", "ca init --folder /srv/limosa-ca --name 'Limosa CA of example.org'"],
        notes="Once for all hosts. Keep the folder, with ca.key in it, off the hosts and in a backup.",
        local=True,
    )
    init.add_argument("--name", default="Limosa CA", help="(Limosa CA)")
    issue = add_command(
        verbs,
        "issue",
        "make or renew the certificate of a host or a person",
        _issue,
        examples=[
            "ca issue host1 --address 10.0.0.1 --address host1.example",
            "ca issue alice --role operator",
            "ca issue monitoring --role viewer --days 90 --out ./monitoring",
        ],
        notes="Without --role the certificate is for a host. Copy what is made to /etc/limosa/pki on the host, or to\n"
        "~/.config/limosa of the person. A viewer may look at every host, an operator may also change things;\n"
        "a host's certificate works only on that host. Issuing again renews the certificate and keeps the key.",
        local=True,
    )
    issue.add_argument("name", metavar="NAME", help="the host's name, as in its settings file, or a person's")
    issue.add_argument("--address", action="append", default=[], help="an IP address or DNS name of the host")
    issue.add_argument("--role", choices=("operator", "viewer"), help="a person's role")
    issue.add_argument("--out", metavar="FOLDER", type=Path, help="(NAME in the current folder)")
    issue.add_argument("--days", type=int, default=730, help="days until it expires (730)")
    listing = add_command(
        verbs, "list", "list the certificates that were made", _list, examples=["ca list"], local=True, also=["ls"]
    )
    for parser in (init, issue, listing):
        folder = configuration_folders(os.environ)[0] / "ca"
        parser.add_argument("--folder", type=Path, default=folder, help=f"the authority's folder ({folder})")


def _init(arguments: argparse.Namespace) -> int:
    from limosa.security import ca  # noqa: PLC0415 - loads cryptography

    ca.create_authority(arguments.folder, arguments.name)
    if arguments.json:
        say_json({"authority": str(arguments.folder)})
    else:
        say(f"made a certificate authority in {arguments.folder}; keep ca.key secret and in a backup")
    return 0


def _issue(arguments: argparse.Namespace) -> int:
    from limosa.security import ca  # noqa: PLC0415 - loads cryptography
    from limosa.wire.endpoints import Role  # noqa: PLC0415

    if not 1 <= arguments.days <= 3650:
        raise InvalidInput("--days is not valid", why=f"{arguments.days} is not between 1 and 3650")
    if arguments.role and arguments.address:
        raise InvalidInput("a person has no --address", todo="leave out --role for a host, or --address for a person")
    out, life = arguments.out or Path(arguments.name), datetime.timedelta(days=arguments.days)
    if arguments.role:
        ca.issue_person(arguments.folder, arguments.name, Role[arguments.role.upper()], out, life=life)
        place = "~/.config/limosa of the person"
    else:
        ca.issue_host(arguments.folder, arguments.name, arguments.address, out, life=life)
        place = "/etc/limosa/pki on the host; its daemon, if it runs, takes them with the next connection"
    if arguments.json:
        say_json({"name": arguments.name, "role": arguments.role or "host", "out": str(out)})
    else:
        say(f"{arguments.name}: certificate and key are in {out}; copy its files to {place}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from limosa.security import ca  # noqa: PLC0415 - loads cryptography

    rows = []
    for certificate in ca.issued(arguments.folder):
        identity = ca.identity_of(certificate)
        rows.append((identity.name, identity.role.name.lower(), f"{certificate.not_valid_after_utc:%Y-%m-%d}"))
    if arguments.json:
        for name, role, until in rows:
            say_json({"name": name, "role": role, "valid_until": until})
    else:
        say_table(("NAME", "ROLE", "VALID UNTIL"), rows)
    return 0
