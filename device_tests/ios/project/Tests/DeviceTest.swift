// Golden vectors, public rows and timings in Core ML. run.sh puts export and job into the bundle's payload, and takes
// what this attaches: an answer for each line, and measured.json (schema.json says what it holds).

import CoreML
import Foundation
import Tokenizers
import XCTest

#if canImport(UIKit)
import UIKit
#endif

private struct Plan: Decodable {
    let unit: String
    let tokens: [Int]
    let warmup, trials: Int
}

final class DeviceTest: XCTestCase {
    func testJudgesAndMeasures() async throws {
        let payload = try XCTUnwrap(Bundle(for: Self.self).url(forResource: "payload", withExtension: nil))
        let folder = payload.appendingPathComponent("export"), job = payload.appendingPathComponent("job")
        let plan = try JSONDecoder().decode(Plan.self, from: Data(contentsOf: job.appendingPathComponent("plan.json")))
        let before = conditions()
        let library = try await AutoTokenizer.from(modelFolder: folder)
        let start = Date()
        let compiled = try EdgeGuard.compiled(folder.appendingPathComponent("model.mlpackage"))
        let units = try XCTUnwrap(["cpu": MLComputeUnits.cpuOnly, "gpu": .cpuAndGPU, "npu": .cpuAndNeuralEngine][plan.unit])
        let edge = try EdgeGuard(folder: folder, model: compiled, units: units) {
            library.encode(text: $0, addSpecialTokens: false)
        }
        let golden = try lines(job.appendingPathComponent("golden.jsonl"))
        XCTAssertFalse(golden.isEmpty, "no golden vectors were brought along")
        _ = try edge.logits(golden[0].ids)
        let loadMs = -start.timeIntervalSinceNow * 1000
        for name in ["golden.jsonl", "rows.jsonl"] {
            let file = job.appendingPathComponent(name)
            if !FileManager.default.fileExists(atPath: file.path) { continue }
            let answers = try lines(file).map { try JSONEncoder().encode(edge.answer($0)) + Data("\n".utf8) }
            attach(Data(answers.joined()), "\(name).answers")
        }
        let timings = try timings(edge, plan, golden)
        let used = try await units(of: compiled, units, plan)
        let measured: [String: Any?] = [
            "device": device(), "runtime": "Core ML", "runtime_version": ProcessInfo.processInfo.operatingSystemVersionString,
            "threads": nil, "compute": used, "load_ms": loadMs, "peak_bytes": peakBytes(), "timings": timings,
            "before": before, "after": conditions(),
        ]
        let object = measured.mapValues { $0 ?? NSNull() }
        attach(try JSONSerialization.data(withJSONObject: object, options: [.prettyPrinted]), "measured.json")
    }

    private func lines(_ file: URL) throws -> [Golden] {
        try String(contentsOf: file, encoding: .utf8).split(separator: "\n").map {
            try JSONDecoder().decode(Golden.self, from: Data($0.utf8))
        }
    }

    /// From token ids to the logits: ids of the longest golden prompt, its middle left out.
    private func timings(_ edge: EdgeGuard, _ plan: Plan, _ golden: [Golden]) throws -> [[String: Any]] {
        let all = try XCTUnwrap(golden.filter { $0.target == "prompt" }.map(\.ids).max { $0.count < $1.count })
        let template = edge.rules.manifest.template
        let tail = template.closing.count + (template.read["prompt"]?.count ?? 0)
        return try plan.tokens.map { tokens in
            let ids = Array(all.prefix(tokens - tail) + all.suffix(tail))
            var trials: [Double] = []
            for number in 0..<(plan.warmup + plan.trials) {
                let start = DispatchTime.now().uptimeNanoseconds
                let logits = try edge.logits(ids)
                let took = Double(DispatchTime.now().uptimeNanoseconds - start) / 1e6
                XCTAssertTrue(logits.allSatisfy(\.isFinite))
                if number >= plan.warmup { trials.append(took) }
            }
            return ["tokens": ids.count, "warmup": plan.warmup, "trials_ms": trials]
        }
    }

    /// The unit that Core ML prefers for each operator of the longest function, by its own plan.
    private func units(of compiled: URL, _ units: MLComputeUnits, _ plan: Plan) async throws -> [String: Any] {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        var counts: [String: Int] = [:]
        let found = try await MLComputePlan.load(contentsOf: compiled, configuration: configuration)
        let length = { (name: String) in Int(name.dropFirst("tokens_".count)) ?? 0 }
        if case .program(let program) = found.modelStructure,
            let function = program.functions.max(by: { length($0.key) < length($1.key) })?.value
        {
            for operation in function.block.operations {
                switch found.deviceUsage(for: operation)?.preferred {
                case .cpu: counts["cpu", default: 0] += 1
                case .gpu: counts["gpu", default: 0] += 1
                case .neuralEngine: counts["npu", default: 0] += 1
                default: continue // constants
                }
            }
        }
        return [
            "asked": plan.unit, "used": counts.keys.sorted(), "nodes": counts.isEmpty ? NSNull() : counts as Any,
            "evidence": "MLComputePlan: the preferred device of each operator",
        ]
    }

    private func device() -> [String: Any] {
        var system = utsname()
        uname(&system)
        let machine = withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        let simulator = ProcessInfo.processInfo.environment["SIMULATOR_MODEL_IDENTIFIER"]
        return [
            "name": simulator ?? machine, "chip": sysctl("machdep.cpu.brand_string") ?? simulator ?? machine, "architecture": "arm64",
            "system": ProcessInfo.processInfo.operatingSystemVersionString,
            "ram_bytes": ProcessInfo.processInfo.physicalMemory,
            "emulated_by": simulator == nil ? NSNull() : "iOS Simulator" as Any, "virtual": simulator != nil,
        ]
    }

    private func sysctl(_ name: String) -> String? {
        var size = 0
        guard sysctlbyname(name, nil, &size, nil, 0) == 0, size > 0 else { return nil }
        var bytes = [CChar](repeating: 0, count: size)
        return sysctlbyname(name, &bytes, &size, nil, 0) == 0 ? String(cString: bytes) : nil
    }

    private func conditions() -> [String: Any] {
        var battery: Any = NSNull()
        #if canImport(UIKit)
        UIDevice.current.isBatteryMonitoringEnabled = true
        if UIDevice.current.batteryLevel >= 0 { battery = Double(UIDevice.current.batteryLevel) * 100 }
        #endif
        return ["load_average": NSNull(), "battery_percent": battery, "temperature_c": NSNull()]
    }

    /// Of resident memory.
    private func peakBytes() -> Int? {
        var info = task_vm_info_data_t()
        var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size)
        let result = withUnsafeMutablePointer(to: &info) {
            $0.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
            }
        }
        return result == KERN_SUCCESS ? Int(info.resident_size_peak) : nil
    }

    private func attach(_ data: Data, _ name: String) {
        let attachment = XCTAttachment(data: data, uniformTypeIdentifier: "public.data")
        attachment.name = name
        attachment.lifetime = .keepAlways
        add(attachment)
    }
}
