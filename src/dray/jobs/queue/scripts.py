"""Every name that dray uses in Redis, and the Lua scripts: what must happen there at once or not at all.

A script that changes keys also gives each of its keys its whole lifetime again: what a job leaves behind that was
killed ends by itself, and what a running job uses does not.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from redis.exceptions import NoScriptError

from dray.errors import ConfigError
from dray.jobs.queue.connection import RedisClient

GROUP = "policy"
DEAD_LETTERS_KEPT = 1000
KEY_LIFETIME = 86_400
"""Seconds after its last use by a script that changes it at which a key ends: the job is gone then."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class JobKeys:
    """The keys of one job. The braces in them put them into one hash slot, so that scripts work on a cluster too.

    Args:
        job: name of the job, unique on its Redis server.

    Raises:
        ConfigError: the name is not 1 to 64 letters, digits, dots, dashes or underscores.
    """

    def __init__(self, job: str) -> None:
        self.job = check_name("job.name", job)
        self.prefix = f"dray:{{{job}}}:"
        # Streams: entries of payloads that no commit has ended; the newest end of entries, which wakes publishers
        # that wait for room; the last dead letters; the newest weights.
        self.rollouts = f"{self.prefix}rollouts"
        self.room = f"{self.prefix}rollouts:room"
        self.dead = f"{self.prefix}rollouts:dead"
        self.weights = f"{self.prefix}weights"
        # Hashes: "producer:sequence" → id of the entry, while the entry is there; counters of `QueueStatistics`.
        self.index = f"{self.prefix}rollouts:index"
        self.counters = f"{self.prefix}rollouts:counters"
        # A random token, which is absent or changed if the stream was lost; a number that fences commits.
        self.stream_epoch = f"{self.prefix}rollouts:epoch"
        self.group_epoch = f"{self.prefix}rollouts:group_epoch"

    @property
    def every(self) -> tuple[str, ...]:
        """All keys."""
        return (
            self.rollouts, self.index, self.stream_epoch, self.group_epoch, self.counters, self.room, self.dead,
            self.weights,
        )  # fmt: skip


def check_name(key: str, name: str) -> str:
    """`name`, if it can be part of a key.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(key, name, "1 to 64 letters, digits, dots, dashes or underscores")
    return name


# --- scripts -----------------------------------------------------------------------------------------------------

_COMMON = f"""
local {{keys}} = unpack(KEYS)
local group = '{GROUP}'
local function entry_of(id) return redis.call('XRANGE', rollouts, id, id)[1] end
local function delivery_of(id) return redis.call('XPENDING', rollouts, group, id, id, 1)[1] end
-- One that was trimmed is there while a consumer holds it. Without the group, no consumer holds any.
local function is_there(id) return entry_of(id) or redis.pcall('XPENDING', rollouts, group, id, id, 1)[1] end
local function fields_of(entry)
  local fields = {{}}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  return fields
end
-- A server that is full may evict keys that have a lifetime, one without the other.
local function restore_index()
  if redis.call('EXISTS', index) == 1 then return end
  for _, entry in ipairs(redis.call('XRANGE', rollouts, '-', '+')) do
    local fields = fields_of(entry)
    if fields['producer'] and fields['sequence'] then
      redis.call('HSET', index, fields['producer'] .. ':' .. fields['sequence'], entry[1])
    end
  end
end
"""
_RENEWING = f"""
local function run()
{{body}}
end
local reply = run()
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, {KEY_LIFETIME}) end
return reply
"""


class Script:
    """A Lua script, sent by its digest where the server knows it.

    Args:
        keys: the names in `JobKeys` of those that it uses: variables of the script.
        body: the script.
        reads_only: it changes nothing.
    """

    def __init__(self, keys: str, body: str, *, reads_only: bool = False) -> None:
        self.reads_only = reads_only
        self._keys = keys.split()
        text = body if reads_only else _RENEWING.replace("{body}", body)
        self._text = _COMMON.replace("{keys}", ", ".join(self._keys)) + text
        self._digest = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: RedisClient, keys: JobKeys, *arguments: str | bytes | int) -> Any:
        """The script's reply."""
        names = [getattr(keys, name) for name in self._keys]
        try:
            return client.do("EVALSHA", self._digest, len(names), *names, *arguments)
        except NoScriptError:
            return client.do("EVAL", self._text, len(names), *names, *arguments)


ATTACH = Script(
    "rollouts index stream_epoch group_epoch",
    """
-- ARGV: fresh token, group epoch to restore or ''
-- Returns: the stream's epoch, 1 if anything was missing and has been made.
local made = 0
if redis.call('EXISTS', rollouts) == 0 then redis.call('DEL', index) end
local found = redis.pcall('XPENDING', rollouts, group)
if found['err'] then
  if not string.find(found['err'], 'NOGROUP', 1, true) then return found end
  redis.call('XGROUP', 'CREATE', rollouts, group, '0', 'MKSTREAM')
  made = 1
end
if made == 1 or redis.call('EXISTS', stream_epoch) == 0 then
  redis.call('SET', stream_epoch, ARGV[1])
  made = 1
end
if ARGV[2] ~= '' and tonumber(redis.call('GET', group_epoch) or '0') < tonumber(ARGV[2]) then
  redis.call('SET', group_epoch, ARGV[2])
  made = 1
end
restore_index()
return {redis.call('GET', stream_epoch), made}
""",
)

PUBLISH = Script(
    "rollouts index stream_epoch counters room",
    """
-- ARGV: known epoch, identity, bound or 0, then field, value, …
-- Returns: 'added' | 'there' | 'lost', and with 'full' the id in `room` after which to wait.
if redis.call('GET', stream_epoch) ~= ARGV[1] or redis.call('EXISTS', rollouts) == 0 then return {'lost'} end
restore_index()
local before = redis.call('HGET', index, ARGV[2])
if before then
  if is_there(before) then
    redis.call('HINCRBY', counters, 'duplicates', 1)
    return {'there'}
  end
  redis.call('HDEL', index, ARGV[2])
  redis.call('HINCRBY', counters, 'trimmed', 1)
end
local bound = tonumber(ARGV[3])
if bound > 0 and redis.call('XLEN', rollouts) >= bound then
  local last = redis.call('XREVRANGE', room, '+', '-', 'COUNT', 1)
  return {'full', last[1] and last[1][1] or '0-0'}
end
local id = redis.call('XADD', rollouts, '*', unpack(ARGV, 4))
redis.call('HSET', index, ARGV[2], id)
redis.call('HINCRBY', counters, 'published', 1)
return {'added'}
""",
)

FINISH = Script(
    "rollouts index group_epoch counters room",
    """
-- ARGV: epoch or '', counter, consumer or '' for any, then identity, …
-- Returns: 'done' and per entry 1 ended, 0 not there, -1 pending for another consumer; or 'old', current epoch;
-- or 'lost' if there is no epoch to compare with.
if ARGV[1] ~= '' then
  local epoch = redis.call('GET', group_epoch)
  if not epoch then return {'lost', ''} end
  if epoch ~= ARGV[1] then return {'old', epoch} end
end
restore_index()
local outcome, ended = {}, 0
for i = 4, #ARGV do
  local id = redis.call('HGET', index, ARGV[i])
  local code = 0
  if id then
    local delivery = delivery_of(id)
    if delivery and ARGV[3] ~= '' and delivery[2] ~= ARGV[3] then
      code = -1
    else
      redis.call('XACK', rollouts, group, id)
      redis.call('XDEL', rollouts, id)
      redis.call('HDEL', index, ARGV[i])
      code = 1
      ended = ended + 1
    end
  end
  outcome[#outcome + 1] = code
end
if ended > 0 then
  redis.call('HINCRBY', counters, ARGV[2], ended)
  redis.call('XADD', room, 'MAXLEN', 1, '*', 'ended', ended)
end
return {'done', outcome}
""",
)

CLAIM = Script(
    "rollouts index counters dead room",
    f"""
-- ARGV: from, to, deliveries after which an entry is a dead letter (0: never), reason, then id, …
-- Returns per entry: id, deliveries, 1 if it is a dead letter now, its fields.
local limit = tonumber(ARGV[3])
local moved, letters = {{}}, 0
for i = 5, #ARGV do
  local id = ARGV[i]
  local delivery = delivery_of(id)
  if delivery and delivery[2] == ARGV[1] then
    local entry = entry_of(id)
    local count = delivery[4]
    if not entry then
      -- Trimmed. The index keeps it: its producer publishes it again, or DROP_TRIMMED counts it.
      redis.call('XACK', rollouts, group, id)
    elseif limit > 0 and count >= limit then
      local letter, fields = {{}}, fields_of(entry)
      for field = 1, #entry[2], 2 do
        local name, value = entry[2][field], entry[2][field + 1]
        if name == 'payload' then name = 'payload_bytes'; value = #value end
        letter[#letter + 1] = name
        letter[#letter + 1] = value
      end
      redis.call('XADD', dead, 'MAXLEN', {DEAD_LETTERS_KEPT}, '*', 'consumer', ARGV[1], 'deliveries', count,
                 'reason', ARGV[4], unpack(letter))
      redis.call('XACK', rollouts, group, id)
      redis.call('XDEL', rollouts, id)
      redis.call('HDEL', index, (fields['producer'] or '') .. ':' .. (fields['sequence'] or ''))
      letters = letters + 1
      moved[#moved + 1] = {{id, count, 1, entry[2]}}
    else
      redis.call('XCLAIM', rollouts, group, ARGV[2], 0, id)
      moved[#moved + 1] = {{id, count + 1, 0, entry[2]}}
    end
  end
end
if letters > 0 then
  redis.call('HINCRBY', counters, 'dead_letters', letters)
  redis.call('XADD', room, 'MAXLEN', 1, '*', 'ended', letters)
end
return moved
""",
)

FORGET_CONSUMER = Script(
    "rollouts",
    """
-- ARGV: consumer.  Deleting a consumer drops what is pending for it, so only without that.
if #redis.call('XPENDING', rollouts, group, '-', '+', 1, ARGV[1]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', rollouts, group, ARGV[1])
return 1
""",
)

LISTED = Script(
    "rollouts index stream_epoch",
    """
-- ARGV: known epoch, then identity, …
-- Returns per identity 0 if it has ended, 1 if it is in the stream or pending, 2 if it was trimmed.
if redis.call('GET', stream_epoch) ~= ARGV[1] or redis.call('EXISTS', rollouts) == 0
   or (redis.call('EXISTS', index) == 0 and redis.call('XLEN', rollouts) > 0) then
  return {'lost'}
end
local states = {}
for i = 2, #ARGV do
  local id = redis.call('HGET', index, ARGV[i])
  if not id then
    states[i - 1] = 0
  elseif is_there(id) then
    states[i - 1] = 1
  else
    states[i - 1] = 2
  end
end
return {'known', states}
""",
    reads_only=True,
)

DROP_TRIMMED = Script(
    "rollouts index counters",
    """
-- ARGV: consumer of which those too are dropped that are pending, or ''.   Returns how many.
local known, dropped = redis.call('HGETALL', index), 0
for i = 1, #known, 2 do
  local id = known[i + 1]
  if not entry_of(id) then
    local delivery = delivery_of(id)
    if not delivery or delivery[2] == ARGV[1] then
      redis.call('XACK', rollouts, group, id)
      redis.call('HDEL', index, known[i])
      dropped = dropped + 1
    end
  end
end
if dropped > 0 then redis.call('HINCRBY', counters, 'trimmed', dropped) end
return dropped
""",
)

ENTRIES = Script(
    "rollouts index",
    """
-- ARGV: identity, …   Returns the fields of those that are there.
local found = {}
for i = 1, #ARGV do
  local id = redis.call('HGET', index, ARGV[i])
  local entry = id and entry_of(id)
  if entry then found[#found + 1] = entry[2] end
end
return found
""",
    reads_only=True,
)

LISTED_WORK_ITEMS = Script(
    "rollouts",
    """
-- Returns the work item of every entry.
local work_items = {}
for _, entry in ipairs(redis.call('XRANGE', rollouts, '-', '+')) do
  local work_item = fields_of(entry)['work_item']
  if work_item then work_items[#work_items + 1] = work_item end
end
return work_items
""",
    reads_only=True,
)

RAISE_COUNTERS = Script(
    "counters",
    """
-- ARGV: counter, value, …   A counter that is higher already stays.
for i = 1, #ARGV, 2 do
  if tonumber(redis.call('HGET', counters, ARGV[i]) or '0') < tonumber(ARGV[i + 1]) then
    redis.call('HSET', counters, ARGV[i], ARGV[i + 1])
  end
end
""",
)

STATISTICS = Script(
    "rollouts counters",
    """
-- Returns: backlog, pending, id of the oldest entry or '', server time in ms, counters.
local time = redis.call('TIME')
local pending = redis.pcall('XPENDING', rollouts, group)[1] or 0  -- none without the group
local first = redis.call('XRANGE', rollouts, '-', '+', 'COUNT', 1)[1]
return {redis.call('XLEN', rollouts), pending, first and first[1] or '',
        tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), redis.call('HGETALL', counters)}
""",
    reads_only=True,
)

BEGIN_EPOCH = Script(
    "group_epoch",
    """
-- ARGV: an epoch that the new one exceeds.   Returns the new epoch.
-- A repeated attempt only skips a number: epochs are compared for equality, and only ever rise.
local epoch = math.max(tonumber(redis.call('GET', group_epoch) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', group_epoch, string.format('%d', epoch))
return epoch
""",
)

PUBLISH_WEIGHTS = Script(
    "weights group_epoch",
    """
-- ARGV: reference, version, 1 to keep an entry that is there, epoch or ''
-- Returns 1 if published, 0 if it was there, -1 under an old epoch. An epoch that is not there refuses nothing.
local epoch = redis.call('GET', group_epoch)
if ARGV[4] ~= '' and epoch and epoch ~= ARGV[4] then return -1 end
local last = redis.call('XREVRANGE', weights, '+', '-', 'COUNT', 1)[1]
if last then
  if ARGV[3] == '1' then return 0 end
  local fields = fields_of(last)
  if fields['reference'] == ARGV[1] and fields['version'] == ARGV[2] then return 0 end
end
redis.call('XADD', weights, 'MAXLEN', 1, '*', 'reference', ARGV[1], 'version', ARGV[2])
return 1
""",
)
