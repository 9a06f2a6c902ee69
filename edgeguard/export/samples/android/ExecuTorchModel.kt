// `model.pte` on ExecuTorch, in place of onnxruntime:
//
//   EdgeGuard.load(folder, "model.pte") { ExecuTorchModel(it) }
//
// build.gradle.kts: org.pytorch:executorch-android (of the version that made the file, see export.json).

package edgeguard

import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

class ExecuTorchModel(file: File) : Model {
    private val module = Module.load(file.path)

    override fun logits(ids: IntArray): FloatArray {
        val row = Tensor.fromBlob(LongArray(ids.size) { ids[it].toLong() }, longArrayOf(1, ids.size.toLong()))
        return module.forward(EValue.from(row))[0].toTensor().dataAsFloatArray
    }

    override fun close() = module.destroy()
}
