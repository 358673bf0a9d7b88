"""The Lua scripts: what must happen in Redis at once or not at all. Key and field names are those of `keys`.

A script that changes keys also gives each of its keys its whole lifetime again: what a job leaves behind that was
killed ends by itself, and what a running job uses does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

from dray.jobs.queue.keys import DEAD_LETTERS_KEPT, KEY_LIFETIME
from dray.jobs.queue.redis_client import RedisClient


class Script:
    """A Lua script, sent by its digest where the server knows it.

    Args:
        body: the script.
        reads_only: it changes nothing.
    """

    __slots__ = ("_digest", "_text")

    def __init__(self, body: str, *, reads_only: bool = False) -> None:
        self._text = text = body if reads_only else _RENEWING.replace("BODY", body)
        self._digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: RedisClient, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> Any:
        """The script's reply."""
        try:
            return client.do("EVALSHA", self._digest, len(keys), *keys, *arguments)
        except NoScriptError:
            return client.do("EVAL", self._text, len(keys), *keys, *arguments)


_RENEWING = f"""
local function run()
BODY
end
local reply = run()
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, {KEY_LIFETIME}) end
return reply
"""

# A server that is full may evict keys that have a lifetime, one without the other. KEYS: rollouts, index, …
_RESTORE_INDEX = """
if redis.call('EXISTS', KEYS[2]) == 0 then
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
    local fields = {}
    for field = 1, #entry[2], 2 do fields[entry[2][field]] = entry[2][field + 1] end
    if fields['producer'] and fields['sequence'] then
      redis.call('HSET', KEYS[2], fields['producer'] .. ':' .. fields['sequence'], entry[1])
    end
  end
end
"""

ATTACH = Script(
    """
-- KEYS: rollouts, index, epoch, group_epoch   ARGV: group, fresh token, group epoch to restore or ''
-- Returns: the stream's epoch, 1 if anything was missing and has been made.
local made = 0
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[2])
end
local found = false
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    for field = 1, #group, 2 do
      if group[field] == 'name' and group[field + 1] == ARGV[1] then found = true end
    end
  end
end
if not found then
  redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
  made = 1
end
if made == 1 or redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('SET', KEYS[3], ARGV[2])
  made = 1
end
if ARGV[3] ~= '' and tonumber(redis.call('GET', KEYS[4]) or '0') < tonumber(ARGV[3]) then
  redis.call('SET', KEYS[4], ARGV[3])
  made = 1
end
"""
    + _RESTORE_INDEX
    + """
return {redis.call('GET', KEYS[3]), made}
"""
)

PUBLISH = Script(
    """
-- KEYS: rollouts, index, epoch, counters, room
-- ARGV: known epoch, identity, group, bound or 0, then field, value, …
-- Returns: 'added' | 'there' | 'lost', and with 'full' the id in `room` after which to wait.
-- An entry that was trimmed, and that no consumer holds, is not there. Without the group, no consumer holds any.
if redis.call('GET', KEYS[3]) ~= ARGV[1] or redis.call('EXISTS', KEYS[1]) == 0 then
  return {'lost'}
end
"""
    + _RESTORE_INDEX
    + """
local before = redis.call('HGET', KEYS[2], ARGV[2])
if before then
  if redis.call('XRANGE', KEYS[1], before, before)[1]
     or redis.pcall('XPENDING', KEYS[1], ARGV[3], before, before, 1)[1] then
    redis.call('HINCRBY', KEYS[4], 'duplicates', 1)
    return {'there'}
  end
  redis.call('HDEL', KEYS[2], ARGV[2])
  redis.call('HINCRBY', KEYS[4], 'trimmed', 1)
end
local bound = tonumber(ARGV[4])
if bound > 0 and redis.call('XLEN', KEYS[1]) >= bound then
  local last = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1)
  return {'full', last[1] and last[1][1] or '0-0'}
end
local id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 5))
redis.call('HSET', KEYS[2], ARGV[2], id)
redis.call('HINCRBY', KEYS[4], 'published', 1)
return {'added'}
"""
)

FINISH = Script(
    """
-- KEYS: rollouts, index, group_epoch, counters, room
-- ARGV: group, epoch or '', counter, then identity, consumer or '' for any, …
-- Returns: 'done' and per entry 1 ended, 0 not there, -1 pending for another consumer; or 'old', current epoch;
-- or 'lost' if there is no epoch to compare with.
if ARGV[2] ~= '' then
  local epoch = redis.call('GET', KEYS[3])
  if not epoch then return {'lost', ''} end
  if epoch ~= ARGV[2] then return {'old', epoch} end
end
"""
    + _RESTORE_INDEX
    + """
local outcome, ended = {}, 0
for i = 4, #ARGV, 2 do
  local id = redis.call('HGET', KEYS[2], ARGV[i])
  local code = 0
  if id then
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
    if pending[1] and ARGV[i + 1] ~= '' and pending[1][2] ~= ARGV[i + 1] then
      code = -1
    else
      redis.call('XACK', KEYS[1], ARGV[1], id)
      redis.call('XDEL', KEYS[1], id)
      redis.call('HDEL', KEYS[2], ARGV[i])
      code = 1
      ended = ended + 1
    end
  end
  outcome[#outcome + 1] = code
end
if ended > 0 then
  redis.call('HINCRBY', KEYS[4], ARGV[3], ended)
  redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'ended', ended)
end
return {'done', outcome}
"""
)

CLAIM = Script(f"""
-- KEYS: rollouts, index, counters, dead, room
-- ARGV: group, from, to, deliveries after which an entry is a dead letter (0: never), reason, then id, …
-- Returns per entry: id, deliveries, 1 if it is a dead letter now, its fields.
local limit = tonumber(ARGV[4])
local moved, dead = {{}}, 0
for i = 6, #ARGV do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if pending[1] and pending[1][2] == ARGV[2] then
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    local count = pending[1][4]
    if not entry then
      -- Trimmed. The index keeps it: its producer publishes it again, or DROP_TRIMMED counts it.
      redis.call('XACK', KEYS[1], ARGV[1], id)
    elseif limit > 0 and count >= limit then
      local letter, producer, sequence = {{}}, '', ''
      for field = 1, #entry[2], 2 do
        local name, value = entry[2][field], entry[2][field + 1]
        if name == 'producer' then producer = value end
        if name == 'sequence' then sequence = value end
        if name == 'payload' then name = 'payload_bytes'; value = #value end
        letter[#letter + 1] = name
        letter[#letter + 1] = value
      end
      redis.call('XADD', KEYS[4], 'MAXLEN', {DEAD_LETTERS_KEPT}, '*', 'consumer', ARGV[2], 'deliveries', count,
                 'reason', ARGV[5], unpack(letter))
      redis.call('XACK', KEYS[1], ARGV[1], id)
      redis.call('XDEL', KEYS[1], id)
      redis.call('HDEL', KEYS[2], producer .. ':' .. sequence)
      dead = dead + 1
      moved[#moved + 1] = {{id, count, 1, entry[2]}}
    else
      redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id)
      moved[#moved + 1] = {{id, count + 1, 0, entry[2]}}
    end
  end
end
if dead > 0 then
  redis.call('HINCRBY', KEYS[3], 'dead_letters', dead)
  redis.call('XADD', KEYS[5], 'MAXLEN', 1, '*', 'ended', dead)
end
return moved
""")

FORGET_CONSUMER = Script("""
-- KEYS: rollouts   ARGV: group, consumer.  Deleting a consumer drops what is pending for it, so only without that.
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  return 1
end
return 0
""")

LISTED = Script(
    """
-- KEYS: rollouts, index, epoch   ARGV: known epoch, group, then identity, …
-- Returns per identity 0 if it has ended, 1 if it is in the stream or pending, 2 if it was trimmed.
if redis.call('GET', KEYS[3]) ~= ARGV[1] or redis.call('EXISTS', KEYS[1]) == 0
   or (redis.call('EXISTS', KEYS[2]) == 0 and redis.call('XLEN', KEYS[1]) > 0) then
  return {'lost'}
end
local states = {}
for i = 3, #ARGV do
  local id = redis.call('HGET', KEYS[2], ARGV[i])
  if not id then
    states[i - 2] = 0
  elseif redis.call('XRANGE', KEYS[1], id, id)[1] or redis.pcall('XPENDING', KEYS[1], ARGV[2], id, id, 1)[1] then
    states[i - 2] = 1
  else
    states[i - 2] = 2
  end
end
return {'known', states}
""",
    reads_only=True,
)

DROP_TRIMMED = Script("""
-- KEYS: rollouts, index, counters   ARGV: group, consumer of which those too are dropped that are pending, or ''
-- Returns how many.
local index, dropped = redis.call('HGETALL', KEYS[2]), 0
for i = 1, #index, 2 do
  local id = index[i + 1]
  if not redis.call('XRANGE', KEYS[1], id, id)[1] then
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
    if not pending or pending[2] == ARGV[2] then
      redis.call('XACK', KEYS[1], ARGV[1], id)
      redis.call('HDEL', KEYS[2], index[i])
      dropped = dropped + 1
    end
  end
end
if dropped > 0 then redis.call('HINCRBY', KEYS[3], 'trimmed', dropped) end
return dropped
""")

ENTRIES = Script(
    """
-- KEYS: rollouts, index   ARGV: identity, …   Returns the fields of those that are there.
local found = {}
for i = 1, #ARGV do
  local id = redis.call('HGET', KEYS[2], ARGV[i])
  local entry = id and redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then found[#found + 1] = entry[2] end
end
return found
""",
    reads_only=True,
)

LISTED_WORK_ITEMS = Script(
    """
-- KEYS: rollouts   Returns the work item of every entry.
local work_items = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
  for field = 1, #entry[2], 2 do
    if entry[2][field] == 'work_item' then work_items[#work_items + 1] = entry[2][field + 1] end
  end
end
return work_items
""",
    reads_only=True,
)

RAISE_COUNTERS = Script("""
-- KEYS: counters   ARGV: counter, value, …   A counter that is higher already stays.
for i = 1, #ARGV, 2 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '0') < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
""")

STATISTICS = Script(
    """
-- KEYS: rollouts, counters, dead   ARGV: group
-- Returns: backlog, pending, dead letters kept, id of the oldest entry or '', server time in ms, counters.
local time = redis.call('TIME')
local pending, oldest = 0, ''
local groups = redis.call('EXISTS', KEYS[1]) == 1 and redis.call('XINFO', 'GROUPS', KEYS[1]) or {}
for _, group in ipairs(groups) do
  local fields = {}
  for field = 1, #group, 2 do fields[group[field]] = group[field + 1] end
  if fields['name'] == ARGV[1] then pending = fields['pending'] end
end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
if first[1] then oldest = first[1][1] end
return {redis.call('XLEN', KEYS[1]), pending, redis.call('XLEN', KEYS[3]), oldest,
        tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), redis.call('HGETALL', KEYS[2])}
""",
    reads_only=True,
)

BEGIN_EPOCH = Script("""
-- KEYS: group_epoch   ARGV: an epoch that the new one exceeds.   Returns the new epoch.
-- A repeated attempt only skips a number: epochs are compared for equality, and only ever rise.
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%d', epoch))
return epoch
""")

PUBLISH_WEIGHTS = Script("""
-- KEYS: weights, group_epoch   ARGV: reference, version, 1 to keep an entry that is there, epoch or ''
-- Returns 1 if published, 0 if it was there, -1 under an old epoch. An epoch that is not there refuses nothing.
local epoch = redis.call('GET', KEYS[2])
if ARGV[4] ~= '' and epoch and epoch ~= ARGV[4] then return -1 end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last then
  if ARGV[3] == '1' then return 0 end
  local fields = {}
  for field = 1, #last[2], 2 do fields[last[2][field]] = last[2][field + 1] end
  if fields['reference'] == ARGV[1] and fields['version'] == ARGV[2] then return 0 end
end
redis.call('XADD', KEYS[1], 'MAXLEN', 1, '*', 'reference', ARGV[1], 'version', ARGV[2])
return 1
""")
