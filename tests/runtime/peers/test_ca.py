"""Certificates: what they say, what is taken, how long they are good."""

import datetime
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from aspenfs.errors import InvalidArgument
from aspenfs.limits import CERTIFICATE_S, CERTIFICATE_SKEW_S
from aspenfs.runtime.peers import ca
from aspenfs.runtime.peers.ca import NodeName

NOW_NS = 1_700_000_000_000_000_000
NAME = NodeName(b"c" * 16, 42, b"b" * 16)


def signed(authority: ca.Authority, name: NodeName = NAME) -> x509.Certificate:
    return ca.sign(authority, ca.load_key(ca.new_key()).public_key(), name, NOW_NS)


@given(cluster_id=st.binary(min_size=16, max_size=16), node=st.integers(1, (1 << 63) - 1),
       born=st.binary(min_size=16, max_size=16))  # fmt: skip
def test_a_name_is_read_back_from_its_uri(cluster_id: bytes, node: int, born: bytes) -> None:
    name = NodeName(cluster_id, node, born)
    assert ca.parse_uri(name.uri()) == name


@pytest.mark.parametrize("uri", [
    "", "aspen://", NAME.uri() + "0", NAME.uri() + "\n", NAME.uri().upper(), NAME.uri().replace("42", "042"),
    NAME.uri().replace("42", "0"), NAME.uri().replace("42", str(1 << 63)), NAME.uri().replace("42", "٤"),
    NAME.uri().replace("aspen", "https"), NAME.uri().replace("/node/", "/nodes/"), "x" + NAME.uri(),
])  # fmt: skip
def test_what_is_not_exactly_a_name_is_none(uri: str) -> None:
    assert ca.parse_uri(uri) is None


def test_a_signed_certificate_names_its_node_and_its_ca() -> None:
    authority, other = ca.new_authority("demo", NOW_NS), ca.new_authority("demo", NOW_NS)
    certificate = signed(authority)
    assert ca.name_of(certificate) == NAME
    assert ca.issued_by(certificate, [other.certificate, authority.certificate]) == authority.certificate
    assert ca.issued_by(certificate, [other.certificate]) is None
    assert ca.name_of(authority.certificate) is None
    assert authority.certificate.subject != other.certificate.subject
    assert ca.fingerprint(authority.certificate) == authority.fingerprint != other.fingerprint


def test_its_time_allows_for_clocks_that_differ_and_two_thirds_of_it_are_used() -> None:
    certificate = signed(ca.new_authority("demo", NOW_NS))
    now = datetime.datetime.fromtimestamp(NOW_NS / 1e9, datetime.UTC)
    assert certificate.not_valid_before_utc == now - datetime.timedelta(seconds=CERTIFICATE_SKEW_S)
    assert certificate.not_valid_after_utc == now + datetime.timedelta(seconds=CERTIFICATE_S)
    assert ca.expires_ns(certificate) == NOW_NS + CERTIFICATE_S * 10**9
    used = (ca.renew_at_ns(certificate) - NOW_NS) / 1e9 / CERTIFICATE_S
    assert 0.66 < used < 0.67


def test_openssl_agrees_that_the_chain_holds(tmp_path: Path) -> None:
    authority = ca.new_authority("demo", NOW_NS)
    (tmp_path / "ca.crt").write_bytes(ca.bundle_pem([authority.certificate]))
    (tmp_path / "node.crt").write_bytes(ca.bundle_pem([signed(authority)]))
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-attime", str(NOW_NS // 10**9), "-purpose", purpose,
                   "-CAfile", "ca.crt", "node.crt"]  # fmt: skip
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_a_certificate_with_two_names_names_nobody() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.fromtimestamp(NOW_NS / 1e9, datetime.UTC)
    uris = [x509.UniformResourceIdentifier(NAME.uri())] * 2
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(uris), critical=False).sign(key, hashes.SHA256())
    )  # fmt: skip
    assert ca.name_of(certificate) is None


def test_a_request_proves_its_key_and_what_else_it_says_does_not_count() -> None:
    pem = ca.new_key()
    public_key = ca.check_request(ca.request(pem, "any label at all, of any length " * 4))
    assert ca.key_fingerprint(public_key) == ca.key_fingerprint(ca.load_key(pem).public_key())


def _csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_requests_for_other_kinds_of_keys_are_not_taken() -> None:
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(InvalidArgument):
            ca.check_request(_csr(key))


@given(data=st.data())
def test_a_damaged_request_is_not_taken(data: st.DataObject) -> None:
    der = bytearray(REQUEST)
    place = data.draw(st.integers(0, len(der) - 1))
    der[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidArgument):
        ca.check_request(bytes(der))
    with pytest.raises(InvalidArgument):
        ca.check_request(data.draw(st.binary(max_size=300)))


REQUEST = ca.request(ca.new_key(), "node")


def test_keys_and_certificates_are_read_back_from_pem() -> None:
    keys = [ca.load_key(ca.new_key()) for _ in range(2)]
    again = ca.load_keys(ca.keys_pem(keys))
    assert [key.private_numbers() for key in again] == [key.private_numbers() for key in keys]
    bundle = [ca.new_authority("demo", NOW_NS).certificate for _ in range(2)]
    assert ca.load_bundle(ca.bundle_pem(bundle)) == bundle
    assert ca.load_certificates([ca.der(each) for each in bundle]) == bundle
    for read in (ca.load_key, ca.load_keys, ca.load_bundle):
        for text in (b"", b"\xff", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"):
            with pytest.raises(InvalidArgument):
                read(text)
    with pytest.raises(InvalidArgument):
        ca.load_certificates([b"x"])
