// Golden vectors, public rows and timings on the phone. run.sh pushes the export and the job, and pulls what this writes.

package edgeguard

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager
import android.os.Build
import androidx.test.ext.junit.runners.AndroidJUnit4
import androidx.test.platform.app.InstrumentationRegistry
import java.io.File
import org.json.JSONArray
import org.json.JSONObject
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith

private const val THREADS = 4

@RunWith(AndroidJUnit4::class)
class DeviceTest {
    private val context: Context = InstrumentationRegistry.getInstrumentation().targetContext
    private val there = File("/data/local/tmp/edgeguard")

    @Test
    fun judgesAndMeasures() {
        context.filesDir.listFiles()?.forEach { it.deleteRecursively() } // nothing of an earlier run may be pulled
        val name = InstrumentationRegistry.getArguments().getString("model") ?: "model.onnx"
        val plan = JSONObject(File(there, "job/plan.json").readText())
        val before = conditions()
        val start = System.nanoTime()
        val guard = load(name)
        val loadMs = since(start)
        val asked = File(there, "job").listFiles { file -> file.name.endsWith(".jsonl") }!!.sorted()
        assertTrue("no golden vectors were pushed", asked.any { it.name == "golden.jsonl" })
        for (file in asked) {
            File(context.filesDir, "${file.name}.answers").bufferedWriter().use { output ->
                file.forEachLine { line -> if (line.isNotBlank()) output.write("${guard.answer(JSONObject(line))}\n") }
            }
        }
        val timings = timings(guard, plan)
        val measured = JSONObject()
            .put("device", device())
            .put("runtime", if (name.endsWith(".pte")) "executorch-android" else "onnxruntime-android")
            .put("runtime_version", if (name.endsWith(".pte")) EXECUTORCH else ONNXRUNTIME)
            .put("threads", if (name.endsWith(".pte")) JSONObject.NULL else THREADS)
            .put("compute", compute(plan, name))
            .put("load_ms", loadMs)
            .put("peak_bytes", peakBytes() ?: JSONObject.NULL)
            .put("timings", timings)
            .put("before", before)
            .put("after", conditions())
        File(context.filesDir, "measured.json").writeText(measured.toString(1))
        guard.close()
    }

    private fun load(name: String): EdgeGuard {
        val folder = File(there, "export")
        return if (name.endsWith(".pte")) EdgeGuard.load(folder, name) { ExecuTorchModel(it) }
        else EdgeGuard.load(folder, name) { OnnxModel(it, THREADS) }
    }

    /** From token ids to the margin: ids of the longest golden prompt, its middle left out. */
    private fun timings(guard: EdgeGuard, plan: JSONObject): JSONArray {
        val golden = File(there, "job/golden.jsonl").readLines().filter { it.isNotBlank() }.map { JSONObject(it) }
        val longest = golden.filter { it.getString("target") == "prompt" }.map { it.getJSONArray("ids") }.maxBy { it.length() }
        val template = JSONObject(File(there, "export/manifest.json").readText()).getJSONObject("template")
        val tail = template.getJSONArray("closing").length() + template.getJSONObject("read").getJSONArray("prompt").length()
        val all = IntArray(longest.length()) { longest.getInt(it) }
        val result = JSONArray()
        val lengths = plan.getJSONArray("tokens")
        for (i in 0 until lengths.length()) {
            val tokens = lengths.getInt(i)
            val ids = all.copyOfRange(0, tokens - tail) + all.copyOfRange(all.size - tail, all.size)
            val trials = JSONArray()
            for (number in 0 until plan.getInt("warmup") + plan.getInt("trials")) {
                val start = System.nanoTime()
                val logits = guard.logits(ids)
                val took = since(start)
                check((logits[1] - logits[0]).isFinite())
                if (number >= plan.getInt("warmup")) trials.put(took)
            }
            result.put(JSONObject().put("tokens", ids.size).put("warmup", plan.getInt("warmup")).put("trials_ms", trials))
        }
        return result
    }

    private fun compute(plan: JSONObject, name: String) = JSONObject()
        .put("asked", plan.getString("unit"))
        .put("used", JSONArray(listOf("cpu")))
        .put("nodes", JSONObject.NULL)
        .put(
            "evidence",
            if (name.endsWith(".pte")) "the program has XNNPACK and portable operators, which are of the CPU"
            else "no other execution provider than the CPU's was asked for",
        )

    private fun device(): JSONObject {
        val memory = ActivityManager.MemoryInfo()
        context.getSystemService(ActivityManager::class.java).getMemoryInfo(memory)
        val chip = if (Build.VERSION.SDK_INT >= 31) "${Build.SOC_MANUFACTURER} ${Build.SOC_MODEL}" else Build.HARDWARE
        val emulator = Build.HARDWARE in setOf("ranchu", "goldfish") || Build.FINGERPRINT.startsWith("generic")
        return JSONObject()
            .put("name", "${Build.MANUFACTURER} ${Build.MODEL}")
            .put("chip", chip)
            .put("architecture", Build.SUPPORTED_ABIS.first())
            .put("system", "Android ${Build.VERSION.RELEASE} ${Build.DISPLAY}")
            .put("ram_bytes", memory.totalMem)
            .put("emulated_by", if (emulator) "Android emulator" else JSONObject.NULL)
            .put("virtual", emulator)
    }

    private fun conditions(): JSONObject {
        val battery = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))
        val level = battery?.getIntExtra(BatteryManager.EXTRA_LEVEL, -1) ?: -1
        val tenths = battery?.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Int.MIN_VALUE) ?: Int.MIN_VALUE
        return JSONObject()
            .put("load_average", JSONObject.NULL)
            .put("battery_percent", if (level < 0) JSONObject.NULL else level.toDouble())
            .put("temperature_c", if (tenths == Int.MIN_VALUE) JSONObject.NULL else tenths / 10.0)
    }

    private fun peakBytes(): Long? = File("/proc/self/status").readLines()
        .firstOrNull { it.startsWith("VmHWM:") }?.split(Regex("\\s+"))?.get(1)?.toLong()?.times(1024)

    private fun since(start: Long) = (System.nanoTime() - start) / 1e6

    private companion object { // of app/build.gradle.kts
        const val ONNXRUNTIME = "1.22.0"
        const val EXECUTORCH = "1.5.1"
    }
}
