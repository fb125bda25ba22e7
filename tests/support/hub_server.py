# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub on 127.0.0.1, as far as its client needs it to fetch, create and push; and a file server that breaks off."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        self.server.log.append(f'{self.command} {self.path}')

    def answer(self, code, body=b'', **headers):
        self.send_response(code)
        for name, value in {'Content-Length': len(body), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_json(self, value, code=200):
        self.answer(code, json.dumps(value).encode(), Content_Type='application/json')

    def refuse(self, code, word):
        self.answer(code, json.dumps({'error': word}).encode(), X_Error_Code=word, X_Error_Message=word)

    def body(self):
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))


class HubHandler(Handler):
    """repositories: {owner/name: {revision: {file: bytes}}}."""

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path == '/api/whoami-v2':
            return self.send_json({'type': 'user', 'name': 'owner', 'orgs': [], 'auth': {'accessToken': {'role': 'write'}}})
        found = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if not found:
            return self.refuse(404, 'EntryNotFound')
        repo, revision, name = found.groups()
        revisions = self.server.repositories.get(repo)
        if revisions is None:
            return self.refuse(401, 'RepoNotFound')  # to those who are not logged in the Hub does not say whether it exists
        commits = {commit_of(repo, revision): files for revision, files in revisions.items()}
        files = revisions.get(revision, commits.get(revision))
        if files is None:
            return self.refuse(404, 'RevisionNotFound')
        commit = revision if revision in commits else commit_of(repo, revision)
        if name not in files:
            self.answer(404, b'', X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
            return None
        content = files[name]
        return self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit,
                           X_Linked_Size=len(content), X_Linked_ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                           Content_Type='application/octet-stream', Accept_Ranges='bytes')

    do_HEAD = do_GET

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self.body()
        if self.headers.get('Authorization') != 'Bearer hf_right':
            return self.refuse(401, 'Unauthorized')
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = f'{asked.get("organization") or "owner"}/{asked["name"]}'
            self.server.repositories.setdefault(name, {'main': {}})
            self.server.private[name] = bool(asked.get('private') or asked.get('visibility') == 'private')
            return self.send_json({'url': f'{self.server.url}/{name}', 'name': name, 'id': name})
        if path == '/api/validate-yaml':
            return self.send_json({'errors': [], 'warnings': []})
        kind, repo, revision = re.fullmatch(r'/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)', path).group(2, 1, 3)
        revisions = self.server.repositories[repo]
        if kind == 'branch':
            revisions[revision] = dict(revisions['main'])
            return self.send_json({})
        if kind == 'preupload':
            names = [file['path'] for file in json.loads(body)['files']]
            return self.send_json({'files': [{'path': name, 'uploadMode': 'regular', 'shouldIgnore': False} for name in names]})
        for line in filter(None, body.split(b'\n')):
            item = json.loads(line)
            if item['key'] == 'file':
                revisions[revision][item['value']['path']] = base64.b64decode(item['value']['content'])
        return self.send_json({'commitUrl': f'{self.server.url}/{repo}/commit/{"c" * 40}', 'commitOid': 'c' * 40, 'hookOutput': ''})


def commit_of(repo, revision):
    return hashlib.sha1(f'{repo} {revision}'.encode()).hexdigest()


class FileHandler(Handler):
    """One file, with ranges; the first answers break off after the numbers of bytes in `server.cuts`."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        content, headers = self.server.content, {'ETag': self.server.tag} if self.server.tag else {}
        if urlparse(self.path).path != '/network.pkl':
            return self.answer(404)
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        first = int(asked[1]) if asked and self.headers.get('If-Range') == self.server.tag else 0
        if first >= len(content):
            return self.answer(416)
        if first:
            headers['Content-Range'] = f'bytes {first}-{len(content) - 1}/{len(content)}'
        self.server.log.append(f'from {first}')
        self.send_response(206 if first else 200)
        for name, value in {**headers, 'Content-Length': len(content) - first}.items():
            self.send_header(name, str(value))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[first:first + cut])
        self.close_connection = first + cut < len(content)
        return None


@contextlib.contextmanager
def serve(handler, **attributes):
    """A server in a thread; its address is in `url`, what it was asked in `log`."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    server.url, server.log, server.private = f'http://127.0.0.1:{server.server_port}', [], {}
    vars(server).update(attributes)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder):
    """{name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
