// A guard on Android: text -> verdict, on the phone, without a server.
//
//   val guard = EdgeGuard.load(File(context.filesDir, "guard"))      // the folder of this export
//   val verdict = guard.judge(listOf(Message("user", text)))
//   if (verdict.action != "allow") stop(verdict)
//
// Rules.kt beside this file is `rules.py` in Kotlin.
// build.gradle.kts: com.microsoft.onnxruntime:onnxruntime-android (1.20 or newer), ai.djl.huggingface:tokenizers and
// ai.djl.android:tokenizer-native. Everything that goes wrong throws: treat that as "block", never as "allow".
// A pass takes a while: call judge away from the main thread, one call at a time.

package edgeguard

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File
import java.nio.LongBuffer
import java.security.MessageDigest
import kotlin.math.abs
import org.json.JSONObject

data class Verdict(
    val action: String,
    val pUnsafe: Double,
    val margin: Double,
    val hazards: Map<String, Double>,
    val target: String,
    val truncated: Boolean,
    val tokens: Int,
)

/** What runs the forward pass: token ids -> logits, one a label of the manifest's head. */
interface Model : Closeable {
    fun logits(ids: IntArray): FloatArray
}

/** `model.onnx` on onnxruntime's CPU provider, which has the operators of com.microsoft that it uses. */
class OnnxModel(file: File, threads: Int = 4) : Model {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(threads)
        environment.createSession(file.path, options)
    }

    override fun logits(ids: IntArray): FloatArray {
        val shape = longArrayOf(1, ids.size.toLong())
        val row = LongArray(ids.size) { ids[it].toLong() }
        val ones = LongArray(ids.size) { 1 }
        OnnxTensor.createTensor(environment, LongBuffer.wrap(row), shape).use { inputIds ->
            OnnxTensor.createTensor(environment, LongBuffer.wrap(ones), shape).use { mask ->
                session.run(mapOf("input_ids" to inputIds, "attention_mask" to mask), setOf("logits")).use { result ->
                    @Suppress("UNCHECKED_CAST")
                    return (result[0].value as Array<FloatArray>)[0]
                }
            }
        }
    }

    override fun close() = session.close()
}

/** A loaded export. Make one with [EdgeGuard.load]. */
class EdgeGuard(
    private val rules: Rules,
    private val tokenize: (String) -> IntArray,
    private val model: Model,
    private val tokenizer: AutoCloseable = AutoCloseable {},
) : Closeable {
    /** Judge the last of [messages]: a response where its role is assistant, else a prompt. */
    fun judge(messages: List<Message>, point: String = "balanced"): Verdict {
        val encoded = rules.encode(messages, tokenize)
        val logits = logits(encoded.ids)
        val margin = logits[1].toDouble() - logits[0]
        val decision = rules.decide(margin, encoded.target, encoded.truncated, point)
        val hazards = rules.head.drop(2).mapIndexed { i, label -> label to sigmoid(logits[i + 2].toDouble()) }.toMap()
        return Verdict(
            decision.action, decision.pUnsafe, margin, hazards, encoded.target, encoded.truncated, encoded.ids.size,
        )
    }

    fun logits(ids: IntArray): FloatArray {
        val found = model.logits(ids)
        check(found.size == rules.head.size) { "the model returned ${found.size} logits" }
        return found
    }

    /** What this device makes of a line of golden.jsonl; `ok` says whether that is right. */
    fun answer(line: JSONObject): JSONObject {
        val messages = line.getJSONArray("messages").objects().map { Message(it.getString("role"), it.getString("content")) }
        val encoded = rules.encode(messages, tokenize)
        val logits = logits(encoded.ids)
        val margin = logits[1].toDouble() - logits[0]
        val own = rules.decide(margin, encoded.target, encoded.truncated)
        val golden = rules.decide(line.getDouble("margin"), encoded.target, encoded.truncated)
        val sameIds = encoded.ids.contentEquals(line.getJSONArray("ids").ints())
        val sameRules = golden.action == line.getString("action") && abs(golden.pUnsafe - line.getDouble("p_unsafe")) < 1e-6
        val close = abs(margin - line.getDouble("margin")) <= line.getDouble("tolerance")
        return JSONObject()
            .put("ok", sameIds && sameRules && close).put("same_ids", sameIds).put("same_rules", sameRules)
            .put("margin", margin).put("p_unsafe", own.pUnsafe).put("action", own.action)
    }

    override fun close() = model.use { tokenizer.close() }

    companion object {
        /** Load the export in [folder], off the main thread; size and SHA-256 of what is loaded are compared with the manifest. */
        fun load(
            folder: File,
            modelName: String = "model.onnx",
            open: (File) -> Model = { OnnxModel(it) },
        ): EdgeGuard {
            val manifest = JSONObject(File(folder, "manifest.json").readText())
            check(manifest.getString("format") == "edgeguard-bundle" && manifest.getInt("format_version") == 1) {
                "manifest.json: expected an edgeguard-bundle of version 1"
            }
            val files = manifest.getJSONObject("files")
            val model = verified(File(folder, modelName), files)
            // Left to itself, the library cuts every text to 512 tokens, so that its end would go unread.
            val whole = mapOf("truncation" to "false", "padding" to "false")
            System.setProperty("OPT_OUT_TRACKING", "true") // else it asks the network whether this is a cloud's machine
            val path = verified(File(folder, "tokenizer.json"), files).toPath()
            val library = HuggingFaceTokenizer.newInstance(path, whole)
            val tokenize = { text: String ->
                library.encode(text, false, false).ids.let { ids -> IntArray(ids.size) { ids[it].toInt() } }
            }
            return try {
                EdgeGuard(Rules(manifest), tokenize, open(model), library)
            } catch (error: Throwable) {
                library.close()
                throw error
            }
        }
    }
}

private fun verified(file: File, files: JSONObject): File {
    val entry = files.getJSONObject(file.name)
    val digest = MessageDigest.getInstance("SHA-256")
    file.inputStream().use { input ->
        val part = ByteArray(1 shl 20)
        while (true) {
            val count = input.read(part)
            if (count < 0) break
            digest.update(part, 0, count)
        }
    }
    val found = digest.digest().joinToString("") { "%02x".format(it) }
    check(file.length() == entry.getLong("bytes") && found == entry.getString("sha256")) {
        "${file.name}: not the file that manifest.json lists"
    }
    return file
}
