// What a platform does beside running the model: token ids of a conversation, the verdict of a margin. `rules.py` in
// Kotlin, with org.json alone, which Android has.

package edgeguard

import kotlin.math.exp
import org.json.JSONArray
import org.json.JSONObject

data class Message(val role: String, val content: String)

data class Encoded(val ids: IntArray, val target: String, val truncated: Boolean)

data class Decision(val pUnsafe: Double, val action: String)

/** Conversation -> token ids, margin -> decision: `rules.py` in Kotlin. [manifest] is manifest.json. */
class Rules(manifest: JSONObject) {
    val head: List<String> = manifest.getJSONArray("head").let { labels -> List(labels.length()) { labels.getString(it) } }
    private val limit = manifest.getInt("max_tokens")
    private val template = manifest.getJSONObject("template")
    private val opening = template.getJSONObject("opening")
    private val closing = template.getJSONArray("closing").ints()
    private val reserved = template.getJSONArray("reserved").ints().toSet()
    private val calibration = manifest.getJSONObject("calibration")
    private val points = manifest.getJSONObject("operating_points")

    /** Throws for nothing to judge, and for ids that no text may yield. */
    fun encode(messages: List<Message>, tokenize: (String) -> IntArray): Encoded {
        val side = limit * CHARS_PER_TOKEN
        val whole = messages.map { it.content.replace(LONE_SURROGATES, "\uFFFD") }
        val texts = whole.map { clip(it, side) }
        require(whole.isNotEmpty() && whole.last().any { it !in BLANK }) { "nothing to judge: the last message is empty" }
        val target = if (messages.last().role == "assistant") "response" else "prompt"
        val bodies = texts.map(tokenize)
        check(bodies.none { body -> body.any { it in reserved } }) { "the tokenizer turned text into a special token" }
        val openings = messages.map { opening.getJSONArray(it.role).ints() }
        val read = template.getJSONObject("read").getJSONArray(target).ints()
        val kept = fit(bodies, openings.map { it.size + closing.size }, limit - read.size)
        val first = bodies.size - kept.size
        val ids = kept.flatMapIndexed { i, body -> openings[first + i].toList() + body.toList() + closing.toList() }
        val cut = first > 0 || kept.indices.any { kept[it].size < bodies[it].size }
        return Encoded((ids + read.toList()).toIntArray(), target, cut || texts != whole)
    }

    /** Margin -> p_unsafe and action: "allow", "block", or "escalate" where not all was read. Throws for what is no number. */
    fun decide(margin: Double, target: String, truncated: Boolean, point: String = "balanced"): Decision {
        check(margin.isFinite()) { "the model returned $margin" }
        val fitted = calibration.getJSONObject(target)
        val pUnsafe = sigmoid(margin / fitted.getDouble("temperature") + fitted.getDouble("bias"))
        check(pUnsafe.isFinite()) { "p_unsafe is $pUnsafe" }
        val threshold = points.getJSONObject(point).getJSONObject("thresholds").getDouble(target)
        return Decision(pUnsafe, if (pUnsafe >= threshold) "block" else if (truncated) "escalate" else "allow")
    }

    /** Head and tail of a text that cannot fit, by characters as Unicode counts them: no surrogate pair is cut. */
    private fun clip(text: String, side: Int): String {
        if (text.codePointCount(0, text.length) <= 2 * side) return text
        val head = text.offsetByCodePoints(0, side)
        val tail = text.offsetByCodePoints(text.length, -side)
        return text.substring(0, head) + text.substring(tail)
    }

    /** Trim to [room] tokens: the judged message before the newest turns, head and tail of each. */
    private fun fit(bodies: List<IntArray>, overheads: List<Int>, room: Int): List<IntArray> {
        if (bodies.sumOf { it.size } + overheads.sum() <= room) return bodies
        val last = bodies.size - 1
        val wanted = bodies.take(last).sumOf { it.size } + overheads.take(last).sum()
        val own = room - overheads[last]
        val share = minOf(wanted, (room * (1 - JUDGED_SHARE)).toInt(), own / 2)
        val kept = ArrayDeque(listOf(cutMiddle(bodies[last], own - share)))
        var left = own - kept[0].size
        for (i in last - 1 downTo 0) {
            if (left - overheads[i] < minOf(bodies[i].size, FEW)) break
            kept.addFirst(cutMiddle(bodies[i], left - overheads[i]))
            left -= overheads[i] + kept[0].size
        }
        return kept
    }

    private fun cutMiddle(ids: IntArray, room: Int): IntArray {
        if (ids.size <= room) return ids
        val start = (room + 1) / 2
        return ids.copyOfRange(0, start) + ids.copyOfRange(ids.size - (room - start), ids.size)
    }

    private companion object {
        const val CHARS_PER_TOKEN = 128 // at most: so huge text is cut before it is tokenized
        const val JUDGED_SHARE = 0.75 // of the room, for the judged message when the turns before it are long
        const val FEW = 8 // tokens of a turn: fewer say nothing
        const val BLANK = "\u0000 \t\r\n"
        val LONE_SURROGATES = Regex("[\\uD800-\\uDBFF](?![\\uDC00-\\uDFFF])|(?<![\\uD800-\\uDBFF])[\\uDC00-\\uDFFF]")
    }
}

internal fun sigmoid(x: Double) = if (x >= 0) 1 / (1 + exp(-x)) else exp(x) / (1 + exp(x)) // neither overflows

internal fun JSONArray.ints() = IntArray(length()) { getInt(it) }

internal fun JSONArray.objects() = List(length()) { getJSONObject(it) }
