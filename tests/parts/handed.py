"""A grid that hands messages over in one process, and an app run on it."""

import uuid

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from featherlight.flower import client_app, server_app


class Handed(Grid):
    """Hands each message to the ClientApp of its node, in this process.

    Args:
        path: the configuration; nodes: ``node_config`` of each; down: (client, round) pairs that end in an error.
    """

    def __init__(self, path, nodes, down=()):
        self.app, self.down, self.replies, self.sent = client_app(path), set(down), {}, []
        self.contexts = {100 + place: Context(1, 100 + place, config, RecordDict(), {}) for place, config in enumerate(nodes)}

    def set_run(self, run):
        raise NotImplementedError

    run = property(set_run)
    create_message = set_run

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        return [self.hand(message) for message in messages]

    def hand(self, message):
        number = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        context = self.contexts[message.metadata.dst_node_id]
        self.sent.append((message.metadata.message_type, message.metadata.group_id, context.node_id))
        if (context.node_config.get("partition-id"), message.metadata.group_id) in self.down:
            self.replies[number] = Message(Error(1, "out of memory"), reply_to=message)
            return number
        try:
            self.replies[number] = self.app(message, context)
        except Exception as error:
            self.replies[number] = Message(Error(0, repr(error)), reply_to=message)
        return number

    def pull_messages(self, message_ids):
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def serve(path, folder, nodes, down, **options):
    """Run the ServerApp of a configuration; returns the grid."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # who this process is: Flower's own are told
    grid, line = Handed(path, nodes, down), f"--federation.folder={folder} {options.pop('arguments', '')}"
    context = Context(1, 0, {}, RecordDict(), {"arguments": line, "wait": 0.5, **options})
    for own in grid.contexts.values():
        own.run_config = context.run_config
    server_app(path)(grid=grid, context=context)
    return grid
