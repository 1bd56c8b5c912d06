"""Tells the templates that write each message by itself, and marks what they write of each.

Of such a template the text of a conversation's first messages is a part of the text of all: one
rendering shows every prompt. Imports jinja2 and nothing heavy, as `environment`.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes

MESSAGES = "messages"
PLAIN = (
    *(nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Const, nodes.Name),
    *(nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call),
    *(nodes.Keyword, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.Concat),
    *(nodes.BinExpr, nodes.UnaryExpr, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair),
)
"""Nodes that leave no name and no block behind for what follows."""
NOT_IN_A_TURN = frozenset({MESSAGES, "loop", "add_generation_prompt", "self", "caller"})
SEEN_SO_FAR = frozenset({"first", "index", "index0"})  # of a loop, whatever follows


def mark_turns(tree: nodes.Template, mark: str) -> bool:
    """Put a mark before each message's text and behind the last one's, in every loop over them.

    Returns whether that could be done: what is written of a message then depends on it and on its
    number alone, and nothing else on any message. If not, the tree is as it was.
    """
    loops = [node for node in tree.body if isinstance(node, nodes.For) and _over_messages(node)]
    others = (node for node in tree.body if node not in loops)
    if not loops or not all(_is_plain(node, frozenset({MESSAGES, "self"})) for node in others):
        return False
    body: list[nodes.Node] = []
    for node in tree.body:
        body.append(node)
        if isinstance(node, nodes.For) and node in loops:
            node.body = [_text(mark), *node.body]
            body.append(_text(mark))
    tree.body = body
    return True


def _over_messages(loop: nodes.For) -> bool:
    """Whether a loop goes through all messages, and looks at no other than its own."""
    through = isinstance(loop.iter, nodes.Name) and loop.iter.name == MESSAGES
    own = isinstance(loop.target, nodes.Name) and loop.target.name not in NOT_IN_A_TURN
    if not through or not own or loop.test or loop.else_ or loop.recursive:
        return False
    return all(_is_plain(node, NOT_IN_A_TURN) for node in loop.body)


def _is_plain(node: nodes.Node, unseen: frozenset[str]) -> bool:
    """Whether a part of a template leaves nothing behind, and reads none of some names."""
    whole = list(_descend(node))
    safe = {
        id(each.node)
        for each in whole
        if isinstance(each, nodes.Getattr) and each.attr in SEEN_SO_FAR
    }
    return all(
        isinstance(each, PLAIN)
        and not (isinstance(each, nodes.Name) and each.name in unseen and not _counts(each, safe))
        for each in whole
    )


def _counts(name: nodes.Name, safe: set[int]) -> bool:
    return name.name == "loop" and id(name) in safe


def _descend(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _text(text: str) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(text)])
