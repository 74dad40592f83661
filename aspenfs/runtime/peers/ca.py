"""The cluster's own certificate authority: keys, certificates, what a certificate says of a node.

Belongs here: making, signing and checking, over bytes (PEM for files, DER on the wire); time comes in
as ns since the epoch. Not here: which files they are in (`credentials.py`), who may have one signed
(`admission.py`, `authority.py`).

A node is named by the one URI among its certificate's alternative names:

    aspen://<cluster id, 32 hex digits>/node/<node id, decimal>/<birth mark, 32 hex digits>

That name, under a signature of the CA, is all that decides who is at the other end of a connection.
Host names and addresses play no part. Keys are ECDSA on P-256 (RFC 8446 §9.1: every TLS 1.3 has it).
"""

import datetime
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from aspenfs.errors import InvalidArgument
from aspenfs.limits import CA_CERTIFICATE_S, CERTIFICATE_S, CERTIFICATE_SKEW_S
from aspenfs.runtime.identity import BORN_BYTES, CLUSTER_ID_BYTES

FINGERPRINT_BYTES = 32
NODE_ID_MAX = (1 << 63) - 1

_URI = re.compile(
    rf"aspen://([0-9a-f]{{{2 * CLUSTER_ID_BYTES}}})/node/([1-9][0-9]{{0,18}})/([0-9a-f]{{{2 * BORN_BYTES}}})"
)
_NS_PER_S = 1_000_000_000


class NodeName(NamedTuple):
    """Who a certificate is for."""

    cluster_id: bytes
    node_id: int
    born: bytes

    def uri(self) -> str:
        return f"aspen://{self.cluster_id.hex()}/node/{self.node_id}/{self.born.hex()}"


def parse_uri(uri: str) -> NodeName | None:
    found = _URI.fullmatch(uri)
    if found is None or int(found[2]) > NODE_ID_MAX:
        return None
    return NodeName(bytes.fromhex(found[1]), int(found[2]), bytes.fromhex(found[3]))


class Authority(NamedTuple):
    """A CA that can sign."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def fingerprint(self) -> bytes:
        return fingerprint(self.certificate)


# --- making ---


def new_key() -> bytes:
    """A new private key, PEM. Its randomness is OpenSSL's own."""
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def new_authority(cluster_name: str, now_ns: int) -> Authority:
    """A new CA. Two of a cluster differ in their subject, so that OpenSSL never confuses them."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    subject = x509.Name([
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, cluster_name),
        x509.NameAttribute(x509.NameOID.COMMON_NAME, f"aspenfs CA {identifier.digest[:4].hex()}"),
    ])  # fmt: skip
    builder = _builder(subject, subject, key.public_key(), now_ns, CA_CERTIFICATE_S)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs=True), critical=True)
    builder = builder.add_extension(identifier, critical=False)
    return Authority(key, builder.sign(key, hashes.SHA256()))


def request(key_pem: bytes, label: str) -> bytes:
    """A certificate signing request (PKCS #10, DER). `label` is for people who read certificates."""
    key = load_key(key_pem)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, label[:64])])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def sign(authority: Authority, public_key: ec.EllipticCurvePublicKey, name: NodeName, now_ns: int,
         lifetime_s: int = CERTIFICATE_S) -> x509.Certificate:
    """The certificate of a node, good for both ends of a connection."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"node {name.node_id}")])
    issuer = authority.certificate
    builder = _builder(subject, issuer.subject, public_key, now_ns, lifetime_s)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=True)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name.uri())])
    builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now_ns: int,
             lifetime_s: int) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(now_ns // _NS_PER_S, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=CERTIFICATE_SKEW_S))
        .not_valid_after(now + datetime.timedelta(seconds=lifetime_s))
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs, crl_sign=signs,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


# --- checking ---


def check_request(der: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request asks a certificate for, after its proof of possession.

    InvalidArgument for anything but a request of `request`'s kind. Names and extensions in it count
    for nothing: what is certified is decided by who signs.
    """
    try:
        csr = x509.load_der_x509_csr(der)
        public_key = csr.public_key()
        valid = csr.is_signature_valid
    except Exception as error:  # what parsing hostile DER may raise is not documented as closed
        raise InvalidArgument(f"not a certificate signing request: {error}") from None
    if not valid or not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise InvalidArgument("a certificate signing request of this kind or signature is not taken")
    if not isinstance(public_key.curve, ec.SECP256R1):
        raise InvalidArgument("a certificate signing request must be for a key on P-256")
    return public_key


def name_of(certificate: x509.Certificate) -> NodeName | None:
    """Who the certificate is for; None if it is not a node's."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return parse_uri(uris[0]) if len(uris) == 1 else None


def issued_by(certificate: x509.Certificate, bundle: Iterable[x509.Certificate]) -> x509.Certificate | None:
    """Which CA of `bundle` signed the certificate."""
    for authority in bundle:
        try:
            certificate.verify_directly_issued_by(authority)
        except (InvalidSignature, ValueError, TypeError):
            continue
        return authority
    return None


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the public key (SubjectPublicKeyInfo, DER): the same for each certificate of a key."""
    return key_fingerprint(certificate.public_key())


def key_fingerprint(public_key: object) -> bytes:
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise InvalidArgument(f"a key of type {type(public_key).__name__} is not one of this cluster's")
    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def renew_at_ns(certificate: x509.Certificate) -> int:
    """When two thirds of its time are over, ns since the epoch."""
    begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return int(begin + (end - begin) * 2 / 3) * _NS_PER_S


def expires_ns(certificate: x509.Certificate) -> int:
    return int(certificate.not_valid_after_utc.timestamp()) * _NS_PER_S


# --- bytes ---


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """InvalidArgument if it is not one of `new_key`."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"not a private key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidArgument(f"a private key of type {type(key).__name__}")
    return key


def load_keys(pem: bytes) -> list[ec.EllipticCurvePrivateKey]:
    """All keys of a file: two while CAs change."""
    blocks = re.findall(rb"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----\n?", pem, re.DOTALL)
    if not blocks:
        raise InvalidArgument("not a private key")
    return [load_key(block) for block in blocks]


def keys_pem(keys: Iterable[ec.EllipticCurvePrivateKey]) -> bytes:
    return b"".join(_key_pem(key) for key in keys)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_bundle(pem: bytes) -> list[x509.Certificate]:
    """The certificates of a file, at least one. InvalidArgument."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise InvalidArgument(f"not certificates: {error}") from None


def bundle_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def load_certificates(ders: Sequence[bytes]) -> list[x509.Certificate]:
    """InvalidArgument."""
    try:
        return [x509.load_der_x509_certificate(each) for each in ders]
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"not a certificate: {error}") from None
