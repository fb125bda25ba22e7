# SPDX-License-Identifier: Apache-2.0
"""Files of the Hugging Face Hub, through its client's own cache and offline mode; its errors become one line."""

import contextlib
import re
from collections.abc import Iterator

from dnnlib.util import UserError, one_line

NAME = re.compile(r'(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?')


def fetch(ref: str, *files: str | tuple[str, ...], repo: str | None = None, revision: str | None = None) -> list[str]:
    """Local paths of the files of a repository; a file may be given as a tuple of names, of which the first that exists is taken.

    ref: the repository's name in errors. repo: owner/name, by default ref itself. Raises UserError."""
    import huggingface_hub  # slow to import, and needed only for names of the Hub

    def first_of(names):
        for name in names[:-1]:
            with contextlib.suppress(huggingface_hub.utils.EntryNotFoundError):
                return download(name)
        return download(names[-1])

    def download(name):
        return huggingface_hub.hf_hub_download(repo or ref, name, revision=revision)

    wanted = [(names,) if isinstance(names, str) else names for names in files]
    with hub_errors(ref, revision, files=', or '.join(' and '.join(names) for names in wanted)):
        return [first_of(names) for names in wanted]


@contextlib.contextmanager
def hub_errors(ref: str, revision: str | None = None, refusal: str = 'no such folder here, and the Hugging Face Hub says',
               files: str = 'a file') -> Iterator[None]:
    """Turns errors of the Hub's client into one line that says what to do; its own log messages are suppressed.

    refusal: how the line begins for errors without a message of their own here. files: what the repository may lack."""
    from huggingface_hub import utils as hub
    level = hub.logging.get_verbosity()
    hub.logging.set_verbosity_error()
    try:
        yield
    except hub.RepositoryNotFoundError:
        raise UserError(f'{ref}: no such folder here, and no such repository on the Hugging Face Hub '
                        '(a private one needs a login)') from None
    except hub.RevisionNotFoundError:
        raise UserError(f'{ref}: the repository has no revision "{revision}" (a branch, a tag or a commit)') from None
    except hub.LocalEntryNotFoundError:
        raise UserError(f'{ref}: no such folder here, not in the Hugging Face cache, and the Hub cannot be reached '
                        '(HF_HUB_OFFLINE?)') from None
    except hub.EntryNotFoundError:
        raise UserError(f'{ref}: the repository lacks {files}') from None
    except (OSError, ValueError, *hub.HfHubHTTPError.__bases__) as err:  # the last are errors of the HTTP library that it uses
        raise UserError(f'{ref}: {refusal}: {one_line(err)}') from None
    finally:
        hub.logging.set_verbosity(level)
