# SPDX-License-Identifier: Apache-2.0
"""Files given by path or URL: URLs are downloaded once into a cache, interrupted downloads are resumed, and digests are checked."""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request

import filelock

from dnnlib.files import file_digest
from dnnlib.progress import Progress
from dnnlib.util import UserError


def cache_dir() -> str:
    """Where downloads are kept: $AMBIENT_CACHE, else the user's cache folder."""
    root = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.environ.get('AMBIENT_CACHE') or os.path.join(root, 'ambient-trainer')


def is_url(ref: str | os.PathLike) -> bool:
    """True for http:// and https:// references."""
    return urllib.parse.urlparse(str(ref)).scheme in ('http', 'https')


def published_file(url: str, sha256: str, given: str | os.PathLike | None, option: str) -> str:
    """Local path of a published file, downloaded once and checked, or of the path or URL that is given in its place.

    option: what gives another one, such as "--detector-weights=PATH", which errors of the download name. Raises UserError."""
    if given not in (None, url):
        return open_url(given)
    try:
        return open_url(url, sha256)
    except UserError as err:
        raise UserError(f'{err.message}, or give its path: {option}') from None


def open_url(ref: str | os.PathLike, sha256: str | None = None) -> str:
    """Local path of a file that may be a URL; URLs are downloaded once into cache_dir(), where an interrupted download is resumed.

    ref: a path, or a URL that may end in #sha256=DIGEST. sha256: expected hexadecimal digest, or its first digits; a file that
    differs is refused and not kept. Raises UserError that names the URL and the cache path."""
    if not is_url(ref):
        if not os.path.isfile(ref):
            raise UserError(f'{ref}: no such file')
        _check_digest(ref, sha256, ref)
        return str(ref)
    url, _, fragment = ref.partition('#')
    if fragment.startswith('sha256='):
        sha256 = fragment.removeprefix('sha256=')
    name = os.path.basename(urllib.parse.urlparse(url).path) or 'download'
    path = os.path.join(cache_dir(), f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}')
    if not os.path.isfile(path):
        _download(url, path, sha256)
    else:
        _check_digest(path, sha256, url)
    return path


def _download(url, path, sha256):
    """Downloads to PATH.part, retrying as long as an attempt makes progress, and renames it; after a failure the next call resumes it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f'{path}.part'
    try:
        with filelock.FileLock(f'{path}.lock'):  # other processes wait, and then find the file
            while not os.path.isfile(path):
                before = _size(part)
                try:
                    _fetch(url, part)
                except (OSError, http.client.HTTPException) as err:
                    if _size(part) > before and not isinstance(err, urllib.error.HTTPError):
                        continue
                    raise
                _check_digest(part, sha256, url, keep=False)
                os.replace(part, path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f'{part}.tag')
    except (OSError, http.client.HTTPException, ValueError) as err:
        kept = f' ({_size(part)} bytes are kept; run it again to resume)' if _size(part) else ''
        raise UserError(f'cannot download {url}: {err}{kept}; or download it elsewhere and save it as {path}') from None


def _fetch(url, part):
    """Downloads the rest of the URL into the file `part`. PATH.part.tag holds the ETag of the version that its bytes belong to."""
    have, tag = _size(part), _read_tag(part)
    headers = {'Range': f'bytes={have}-', 'If-Range': tag} if have and tag else {}
    with _open(urllib.request.Request(url, headers=headers), part) as response:
        found = response.headers
        resumed = response.status == 206 and (found.get('Content-Range') or '').startswith(f'bytes {have}-')
        if response.status == 206 and not resumed:
            raise OSError(f'the server sent {found.get("Content-Range")} when asked for the bytes from {have} on')
        have = have if resumed else 0
        total = int(found['Content-Length']) + have if found.get('Content-Length') else None
        tag = found.get('ETag') or found.get('Last-Modified') or ''
        with open(f'{part}.tag', 'w', encoding='utf-8') as f:
            f.write('' if tag.startswith('W/') else tag)  # a weak tag does not guarantee identical bytes
        name = os.path.basename(part).removesuffix('.part')
        with open(part, 'ab' if resumed else 'wb') as out, Progress(total, name, 'B', initial=have, unit_scale=True) as bar:
            while chunk := response.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise OSError(f'the connection ended after {_size(part)} of {total} bytes')


def _open(request, part):
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as err:
        if err.code == 416:  # no bytes beyond those we have: the file is complete or has changed; start again
            os.unlink(part)
            return urllib.request.urlopen(request.full_url, timeout=60)
        raise


def _size(path):
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _read_tag(part):
    try:
        with open(f'{part}.tag', encoding='utf-8') as f:
            return f.read()
    except FileNotFoundError:
        return ''


def _check_digest(path, sha256, ref, keep=True):
    if sha256 and not (found := file_digest(path)).startswith(sha256.lower()):
        if not keep:
            os.unlink(path)
        hint = f'remove {path} and fetch it again' if keep else 'the download was deleted'
        raise UserError(f'{ref}: SHA-256 is {found}, expected {sha256}; {hint}')
