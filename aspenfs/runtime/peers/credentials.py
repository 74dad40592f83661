"""What this node shows and trusts: its certificate and the CAs, in files of the state directory.

Belongs here: making, reading and replacing those files, and the TLS contexts that come of them. Not
here: the certificates' contents (`ca.py`), when they are renewed (`authority.py`).

    node.key   this node's private key; made here, never leaves
    node.crt   its certificate, signed by a CA of ca.crt; the last file to appear: with it, all is there
    ca.crt     the CAs that it trusts: one, or two while they change
    ca.key     the keys of those CAs; on voters only
"""

import ssl
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from aspenfs.errors import Corrupt, InvalidArgument
from aspenfs.runtime import identity
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.peers import ca
from aspenfs.runtime.peers.ca import Authority, NodeName
from aspenfs.seams import Clock, Entropy

ALPN = "aspen/1"

_ADVICE = "restore it from a backup, or join the cluster again with a new ticket and an empty directory"


class Credentials(NamedTuple):
    """A certificate of this node, and whom it trusts. The files stay: OpenSSL reads the key from there."""

    directory: Path
    name: NodeName
    certificate: x509.Certificate
    bundle: tuple[x509.Certificate, ...]

    def server_context(self) -> ssl.SSLContext:
        """Asks for a certificate and checks it, but lets those without one in: they may join, no more."""
        context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.bundle)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0  # a resumed session would not look at certificates again
        self._show(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Who is at the other end is for the caller to read from its certificate: no host names."""
        context = client_context(self.bundle)
        self._show(context)
        return context

    def _show(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.directory / identity.NODE_CERTIFICATE_FILE,
                                self.directory / identity.NODE_KEY_FILE)  # fmt: skip


def client_context(bundle: Sequence[x509.Certificate]) -> ssl.SSLContext:
    """Of one who has no certificate yet: trusts `bundle`, or, if it is empty, anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if not bundle:
        context.verify_mode = ssl.CERT_NONE
    return _strict(context, bundle)


def _strict(context: ssl.SSLContext, bundle: Sequence[x509.Certificate]) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols([ALPN])
    if bundle:
        context.load_verify_locations(cadata=ca.bundle_pem(bundle).decode("ascii"))
    return context


def load(directory: Path) -> Credentials | None:
    """What is in the directory; None if it has no certificate. IdentityLost, Corrupt."""
    path = directory / identity.NODE_CERTIFICATE_FILE
    certificate = _certificate(path)
    if certificate is None:
        return None
    name = ca.name_of(certificate)
    here = identity.read(directory)
    if name is None or here is None or (name.cluster_id, name.node_id) != (here.cluster_id, here.node_id):
        raise Corrupt(str(path), 0, f"the certificate is not for the node of {identity.FILE_NAME}", _ADVICE)
    identity.check_born(directory, name.born)
    key = node_key(directory)
    if key is None or ca.key_fingerprint(key.public_key()) != ca.fingerprint(certificate):
        raise Corrupt(str(path), 0, f"{identity.NODE_KEY_FILE} is not its key", _ADVICE)
    bundle = load_bundle(directory)
    if ca.issued_by(certificate, bundle) is None:
        raise Corrupt(str(path), 0, f"no CA of {identity.CA_BUNDLE_FILE} signed it", _ADVICE)
    return Credentials(directory, name, certificate, tuple(bundle))


def establish(directory: Path, clock: Clock, entropy: Entropy) -> Credentials:
    """The credentials of the directory; for a node that has none and is alone, with a CA of its own.

    The directory has an identity. Every step may be the last one before a crash: the next call goes on.
    """
    found = load(directory)
    if found is not None:
        return found
    here = identity.read(directory)
    assert here is not None, "a node without an identity"
    name = NodeName(here.cluster_id, here.node_id, identity.give_birth(directory, entropy))
    authority = _authority(directory, here, clock)
    key = make_node_key(directory)
    certificate = ca.sign(authority, key.public_key(), name, clock.time_ns())
    return install(directory, certificate, [authority.certificate])


def _authority(directory: Path, here: Identity, clock: Clock) -> Authority:
    found = authorities(directory)
    if found:
        return found[0]
    made = ca.new_authority(here.name, clock.time_ns())
    identity.write_file(directory / identity.CA_KEY_FILE, ca.keys_pem([made.key]))
    identity.write_file(directory / identity.CA_BUNDLE_FILE, ca.bundle_pem([made.certificate]))
    return made


def install(directory: Path, certificate: x509.Certificate,
            bundle: Sequence[x509.Certificate]) -> Credentials:  # fmt: skip
    """Puts a certificate and the CAs that it needs in place; the credentials that are there now.

    InvalidArgument, and nothing changed, if it is not this node's or signed by none of them.
    """
    key, name = node_key(directory), ca.name_of(certificate)
    if key is None or ca.key_fingerprint(key.public_key()) != ca.fingerprint(certificate) or name is None:
        raise InvalidArgument("the certificate is not for this node")
    if ca.issued_by(certificate, bundle) is None:
        raise InvalidArgument("none of the CAs signed the certificate")
    # The new CAs first: a crash in between leaves the old certificate, which `trust` has not taken
    # from among them unless its owner meant to.
    trust(directory, bundle)
    path = directory / identity.NODE_CERTIFICATE_FILE
    identity.write_file(path, ca.bundle_pem([certificate]))
    return Credentials(directory, name, certificate, tuple(bundle))


def trust(directory: Path, bundle: Sequence[x509.Certificate]) -> None:
    """From the next context on these CAs are trusted, and no others."""
    identity.write_file(directory / identity.CA_BUNDLE_FILE, ca.bundle_pem(bundle))


def load_bundle(directory: Path) -> list[x509.Certificate]:
    """The CAs trusted here; none if there is no such file. Corrupt."""
    path = directory / identity.CA_BUNDLE_FILE
    try:
        return ca.load_bundle(path.read_bytes())
    except FileNotFoundError:
        return []
    except InvalidArgument as error:
        raise Corrupt(str(path), 0, str(error), _ADVICE) from error


def make_node_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    """This node's key, made if it has none yet."""
    key = node_key(directory)
    if key is None:
        pem = ca.new_key()
        identity.write_file(directory / identity.NODE_KEY_FILE, pem)
        key = ca.load_key(pem)
    return key


def node_key(directory: Path) -> ec.EllipticCurvePrivateKey | None:
    path = directory / identity.NODE_KEY_FILE
    try:
        return ca.load_key(path.read_bytes())
    except FileNotFoundError:
        return None
    except InvalidArgument as error:
        raise Corrupt(str(path), 0, str(error), _ADVICE) from error


def authorities(directory: Path) -> list[Authority]:
    """The CAs of ca.crt whose keys are here, in the order of ca.crt. Corrupt."""
    keys = _authority_keys(directory)
    return [Authority(keys[ca.fingerprint(each)], each) for each in load_bundle(directory)
            if ca.fingerprint(each) in keys]  # fmt: skip


def add_authority_keys(directory: Path, keys: Iterable[ec.EllipticCurvePrivateKey]) -> None:
    """Adds keys to ca.key; those that are there stay. Corrupt."""
    held = _authority_keys(directory)
    added = {ca.key_fingerprint(key.public_key()): key for key in keys}
    if not added.keys() <= held.keys():
        _write_authority_keys(directory, {**held, **added})


def keep_authority_keys(directory: Path, fingerprints: Set[bytes]) -> None:
    """Removes all but these from ca.key; with the last one, the file. Corrupt."""
    held = _authority_keys(directory)
    kept = {fingerprint: key for fingerprint, key in held.items() if fingerprint in fingerprints}
    if not kept:
        identity.remove_file(directory / identity.CA_KEY_FILE)
    elif len(kept) < len(held):
        _write_authority_keys(directory, kept)


_Keys = dict[bytes, ec.EllipticCurvePrivateKey]  # by fingerprint


def _authority_keys(directory: Path) -> _Keys:
    path = directory / identity.CA_KEY_FILE
    try:
        keys = ca.load_keys(path.read_bytes())
    except FileNotFoundError:
        return {}
    except InvalidArgument as error:
        raise Corrupt(str(path), 0, str(error), "copy it from another voter's state directory") from error
    return {ca.key_fingerprint(key.public_key()): key for key in keys}


def _write_authority_keys(directory: Path, keys: _Keys) -> None:
    identity.write_file(directory / identity.CA_KEY_FILE, ca.keys_pem(keys.values()))


def _certificate(path: Path) -> x509.Certificate | None:
    try:
        certificates = ca.load_bundle(path.read_bytes())
    except FileNotFoundError:
        return None
    except InvalidArgument as error:
        raise Corrupt(str(path), 0, str(error), _ADVICE) from error
    return certificates[0]
