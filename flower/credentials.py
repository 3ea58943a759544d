"""Keys to try a federation with: a certificate authority of one's own, the SuperLink's certificate, a key for every SuperNode.

Who has certificates of an authority already uses those; a SuperNode's key is best made where it is used (``ssh-keygen -t ecdsa -b 384``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = timedelta(days=365)


def write_credentials(folder: Path, hosts: Sequence[str], nodes: int) -> None:
    """Write ``ca.crt``, ``server.crt``, ``server.key``, and ``node-0``, ``node-0.pub``, …; private ones for their owner's eyes alone. The
    authority's own key is not kept: nobody can make another certificate of it.

    Args:
        hosts: names and addresses at which clients reach the SuperLink; nodes: how many SuperNodes there are.

    Raises:
        ValueError: something is in the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = _certificate("featherlight federation", authority, None, authority).sign(authority, hashes.SHA384())
    leaf = _certificate(hosts[0], server, root, authority, [_name(host) for host in hosts]).sign(authority, hashes.SHA384())
    (folder / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    _write_private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    for number in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(folder / f"node-{number}", key, serialization.PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"node-{number}.pub").write_bytes(public + b"\n")


def _certificate(
    name: str,
    key: EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    signer: EllipticCurvePrivateKey,
    hosts: Iterable[x509.GeneralName] = (),
) -> x509.CertificateBuilder:
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]), datetime.now(UTC)
    authority, is_root = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), issuer is None
    usage = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + VALID)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
        .add_extension(usage, critical=True)
    )
    if is_root:
        return builder
    server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    return builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False).add_extension(server, critical=False)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_private(path: Path, key: EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
